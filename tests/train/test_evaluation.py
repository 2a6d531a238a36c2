from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError
from stratagem.train import BaseMetric, Evaluator
from tests.train.toys import TEST, VALIDATION, EventLog, Samples, Toy, loader

# Three of four samples are correct: 0, 1 and 2; the fourth is predicted as 1.
OUTPUTS = {"preds": torch.eye(3)[[0, 1, 2, 1]], "target": torch.tensor([0, 1, 2, 2])}
ACCURACY = {"type": "Accuracy", "task": "multiclass", "num_classes": 3, "average": "micro"}


class Numbers(BaseMetric):
    """A metric that collects the indices of the samples."""

    default_prefix = "own"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_batch

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"numbers": tuple(results), "count": len(results)}


def evaluate(metrics: Any, *batches: Any, size: int = 4) -> dict[str, Any]:
    """Return the values of metrics over batches of four samples."""
    evaluator = Evaluator(metrics)
    for batch in batches or (OUTPUTS,):
        evaluator.process([0, 1, 2, 3], batch)
    return evaluator.evaluate(size)


@pytest.mark.parametrize(
    "metrics",
    [ACCURACY, MulticlassAccuracy(3, average="micro"), [ACCURACY]],
    ids=["configuration", "built", "list"],
)
def test_the_default_name_of_a_metric(metrics: Any):
    """A metric without a name is named after its class in lowercase, and three of four predictions are correct."""
    name = "multiclassaccuracy" if isinstance(metrics, MulticlassAccuracy) else "accuracy"
    assert evaluate(metrics) == {name: 0.75}


def test_a_mapping_names_the_metrics():
    """A mapping names the metrics; the macro recall is the mean of 1, 1 and 1/2."""
    metrics = {"right": ACCURACY, "found": MulticlassRecall(3, average="macro")}
    assert evaluate(metrics) == {"right": 0.75, "found": pytest.approx(2.5 / 3)}


def test_outputs_may_be_a_tuple():
    """Outputs may be a tuple in the order of the metric's ``update``."""
    assert evaluate(ACCURACY, (OUTPUTS["preds"], OUTPUTS["target"])) == {"accuracy": 0.75}


def test_values_are_over_all_batches_and_reset():
    """Values are computed over all batches and reset afterwards."""
    evaluator = Evaluator(ACCURACY)
    wrong = {"preds": OUTPUTS["preds"], "target": torch.tensor([1, 0, 0, 0])}
    for outputs in (OUTPUTS, wrong):
        evaluator.process(None, outputs)
    assert evaluator.evaluate(8) == {"accuracy": 3 / 8}
    evaluator.process(None, OUTPUTS)
    assert evaluator.evaluate(4) == {"accuracy": 0.75}


def test_a_metric_with_several_values_gives_a_list():
    """A metric with one value per class, here recalls of 1, 1 and 1/2, gives a list."""
    assert evaluate({"recall": MulticlassRecall(3, average=None)}) == {"recall": [1.0, 1.0, 0.5]}


def test_a_custom_metric_receives_results_in_the_order_of_the_samples():
    """A custom metric receives the results in the order of the samples, limited to the given size."""
    evaluator = Evaluator(Numbers())
    evaluator.process([0, 1, 2], None)
    evaluator.process([3, 4, 5], None)
    assert evaluator.evaluate(5) == {"own/numbers": (0, 1, 2, 3, 4), "own/count": 5}
    assert evaluator.evaluate(0) == {"own/numbers": (), "own/count": 0}


def test_a_given_prefix_replaces_the_default():
    """``prefix`` replaces the default name, which is necessary for two metrics of the same class."""
    values = evaluate([Numbers(prefix="a"), ACCURACY])
    assert list(values) == ["a/numbers", "a/count", "accuracy"]


def test_two_metrics_of_one_class_need_names():
    """The error for two metrics with the same name shows how to name them."""
    with pytest.raises(ConfigValueError, match=r"'accuracy'.*dict\(first="):
        Evaluator([ACCURACY, ACCURACY])


def test_two_values_with_the_same_name_are_rejected():
    """Two values with the same name raise an error."""

    class Accuracy(Numbers):
        default_prefix = None

        def compute_metrics(self, results: list[int]) -> dict[str, Any]:
            return {"accuracy": 1.0}

    with pytest.raises(ConfigValueError, match=r"'accuracy'.*prefix or a name"):
        evaluate({"own": Accuracy(), "accuracy": ACCURACY})


@pytest.mark.parametrize("outputs", [None, OUTPUTS["preds"], [1], {"preds": OUTPUTS["preds"]}, {"scores": 1}])
def test_outputs_without_predictions_and_targets_are_rejected(outputs: Any):
    """The error for invalid outputs shows the result of val_step and what to return."""
    with pytest.raises(
        TrainingError, match=rf"MulticlassAccuracy.*val_step returned a {type(outputs).__name__}.*'preds'"
    ):
        Evaluator(ACCURACY).process(None, outputs)


@pytest.mark.parametrize("wrong", [3, "Accuracy", [object()], {"a": None}])
def test_an_invalid_metric_is_rejected(wrong: Any):
    """The error for an invalid metric describes valid ones."""
    with pytest.raises(ConfigTypeError, match="Expected a torchmetrics metric"):
        Evaluator(wrong)


def test_an_evaluator_without_metrics_is_rejected():
    """An evaluator without metrics raises an error."""
    with pytest.raises(ConfigValueError, match="no metric"):
        Evaluator({})


def test_validation_counts_every_sample_once(make_runner: Any):
    """Nine samples in batches of two are evaluated in order, without gradients, in eval mode."""
    seen = []

    class Watching(Numbers):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            seen.append((torch.is_grad_enabled(), data_samples["preds"].requires_grad))
            self.results += data_samples["numbers"].tolist()

    validation = {**VALIDATION, "val_dataloader": loader(9), "val_evaluator": Watching()}
    runner = make_runner(**validation)
    assert runner.val() == {"own/numbers": tuple(range(9)), "own/count": 9}
    assert set(seen) == {(False, False)}
    assert not runner.strategy.model.training


def test_a_test_has_separate_events_and_step(make_runner: Any):
    """A test uses ``test_step`` and its own events."""

    class Tested(Toy):
        def test_step(self, data: Any) -> Any:
            return {"preds": torch.eye(3)[data[1]], "target": data[1]}

    log = EventLog()
    runner = make_runner(model={"type": Tested}, custom_hooks=[log], **TEST)
    assert runner.test() == {"accuracy": 1.0}
    assert log.names == [
        "before_run", "before_test", "before_test_epoch", *["before_test_iter", "after_test_iter"] * 3,
        "after_test_epoch", "after_test", "after_run",
    ]  # fmt: skip


class Boxes(BaseMetric):
    """A metric with three results per sample."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [0.0, 1.0, 2.0] * len(data_samples["preds"])

    def compute_metrics(self, results: list[float]) -> dict[str, Any]:
        return {"count": len(results), "mean": sum(results) / len(results)}


def test_all_results_of_a_metric_are_kept(make_runner: Any):
    """Five samples give fifteen results, none of which are removed."""
    assert make_runner(**{**VALIDATION, "val_evaluator": Boxes()}).val() == {"count": 15, "mean": 1.0}


class Stream(IterableDataset[Any]):
    """A stream of samples without a length."""

    def __iter__(self) -> Any:
        samples = Samples(5)
        return (samples[index] for index in range(5))


def test_a_stream_without_a_length_is_evaluated(make_runner: Any):
    """A stream without a length can be evaluated."""

    class Watching(Numbers):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results += data_samples["numbers"].tolist()

    validation = {"val_dataloader": {"dataset": Stream(), "batch_size": 2}, "val_evaluator": Watching(), "val_cfg": {}}
    assert make_runner(**validation).val() == {"own/numbers": (0, 1, 2, 3, 4), "own/count": 5}


def test_the_distribution_of_a_loader_is_logged_once(make_runner: Any, capfd: pytest.CaptureFixture[str]):
    """The order and distribution of each loader are logged in one line."""
    runner = make_runner(**VALIDATION, log_level="INFO")
    runner.train()
    runner.val()
    log = capfd.readouterr().err
    assert log.count("Training data: 13 samples of Samples in the order of DefaultSampler, batches of 2") == 1
    assert log.count("Validation data: 5 samples of Samples in the order of DefaultSampler, batches of 2") == 1


class Adjusted(BaseMetric):
    """A metric that overrides ``evaluate`` with MMEngine's signature."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1.0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"count": float(len(results))}

    def evaluate(self, size: int | None) -> dict[str, float]:
        return {**super().evaluate(size), "adjusted": 1.0}


def test_a_metric_may_override_evaluate() -> None:
    """An overridden ``evaluate`` is called with the size, as in MMEngine, and receives all results."""
    evaluator = Evaluator(Adjusted())
    evaluator.process(None, None)
    evaluator.process(None, None)
    assert evaluator.evaluate(by_batch=True) == {"count": 2.0, "adjusted": 1.0}
