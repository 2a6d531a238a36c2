from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall
from toys import TEST, VALIDATION, EventLog, Samples, Toy, loader

from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError
from stratagem.train import BaseMetric, Evaluator

# Of four samples three are right: 0, 1 and 2; the fourth is taken for a 1.
OUTPUTS = {"preds": torch.eye(3)[[0, 1, 2, 1]], "target": torch.tensor([0, 1, 2, 2])}
ACCURACY = {"type": "Accuracy", "task": "multiclass", "num_classes": 3, "average": "micro"}


class Numbers(BaseMetric):
    """Collects the numbers of the samples."""

    default_prefix = "own"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_batch

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"numbers": tuple(results), "count": len(results)}


def evaluate(metrics: Any, *batches: Any, size: int = 4) -> dict[str, Any]:
    """Return the values of metrics over some batches of four samples."""
    evaluator = Evaluator(metrics)
    for batch in batches or (OUTPUTS,):
        evaluator.process([0, 1, 2, 3], batch)
    return evaluator.evaluate(size)


@pytest.mark.parametrize(
    "metrics",
    [ACCURACY, MulticlassAccuracy(3, average="micro"), [ACCURACY]],
    ids=["configuration", "built", "list"],
)
def test_a_metric_is_called_by_its_class_in_small_letters(metrics: Any):
    """Three of four are right, under the name that the user wrote."""
    name = "multiclassaccuracy" if isinstance(metrics, MulticlassAccuracy) else "accuracy"
    assert evaluate(metrics) == {name: 0.75}


def test_a_mapping_names_the_metrics():
    """Macro recall: the classes have 1, 1 and 1/2."""
    metrics = {"right": ACCURACY, "found": MulticlassRecall(3, average="macro")}
    assert evaluate(metrics) == {"right": 0.75, "found": pytest.approx(2.5 / 3)}


def test_predictions_may_come_as_a_tuple():
    """In the order of the metric's update."""
    assert evaluate(ACCURACY, (OUTPUTS["preds"], OUTPUTS["target"])) == {"accuracy": 0.75}


def test_values_are_over_all_batches_and_begin_anew():
    """Nothing of one evaluation goes into the next."""
    evaluator = Evaluator(ACCURACY)
    wrong = {"preds": OUTPUTS["preds"], "target": torch.tensor([1, 0, 0, 0])}
    for outputs in (OUTPUTS, wrong):
        evaluator.process(None, outputs)
    assert evaluator.evaluate(8) == {"accuracy": 3 / 8}
    evaluator.process(None, OUTPUTS)
    assert evaluator.evaluate(4) == {"accuracy": 0.75}


def test_a_metric_with_several_values_gives_a_list():
    """One value for each class: recalls of 1, 1 and 1/2."""
    assert evaluate({"recall": MulticlassRecall(3, average=None)}) == {"recall": [1.0, 1.0, 0.5]}


def test_an_own_metric_gets_the_results_in_the_order_of_the_samples():
    """Its names have its prefix; a caller may give the number of results to keep."""
    evaluator = Evaluator(Numbers())
    evaluator.process([0, 1, 2], None)
    evaluator.process([3, 4, 5], None)
    assert evaluator.evaluate(5) == {"own/numbers": (0, 1, 2, 3, 4), "own/count": 5}
    assert evaluator.evaluate(0) == {"own/numbers": (), "own/count": 0}


def test_a_prefix_that_is_given_stands_before_the_default():
    """Two metrics of one class need it."""
    values = evaluate([Numbers(prefix="a"), ACCURACY])
    assert list(values) == ["a/numbers", "a/count", "accuracy"]


def test_two_metrics_of_one_class_need_names():
    """Else one would hide the other; the message says how to name them."""
    with pytest.raises(ConfigValueError, match=r"'accuracy'.*dict\(first="):
        Evaluator([ACCURACY, ACCURACY])


def test_two_values_of_one_name_are_refused():
    """An own metric may give a name that another has."""

    class Accuracy(Numbers):
        default_prefix = None

        def compute_metrics(self, results: list[int]) -> dict[str, Any]:
            return {"accuracy": 1.0}

    with pytest.raises(ConfigValueError, match=r"'accuracy'.*prefix or a name"):
        evaluate({"own": Accuracy(), "accuracy": ACCURACY})


@pytest.mark.parametrize("outputs", [None, OUTPUTS["preds"], [1], {"preds": OUTPUTS["preds"]}, {"scores": 1}])
def test_outputs_without_predictions_and_targets_are_an_error(outputs: Any):
    """It says what val_step returned and what to return."""
    with pytest.raises(
        TrainingError, match=rf"MulticlassAccuracy.*val_step returned a {type(outputs).__name__}.*'preds'"
    ):
        Evaluator(ACCURACY).process(None, outputs)


@pytest.mark.parametrize("wrong", [3, "Accuracy", [object()], {"a": None}])
def test_what_is_no_metric_is_refused(wrong: Any):
    """The message says what a metric is."""
    with pytest.raises(ConfigTypeError, match="A metric is one of torchmetrics"):
        Evaluator(wrong)


def test_an_evaluator_without_a_metric_is_refused():
    """It would measure nothing."""
    with pytest.raises(ConfigValueError, match="no metric"):
        Evaluator({})


def test_validation_counts_every_sample_once(make_runner: Any):
    """Nine samples in batches of two, in order, with no gradient and the model in eval mode."""
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


def test_the_test_has_its_own_events_and_step(make_runner: Any):
    """A model may predict otherwise in a test than in a validation."""

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
    """Appends three results per sample."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [0.0, 1.0, 2.0] * len(data_samples["preds"])

    def compute_metrics(self, results: list[float]) -> dict[str, Any]:
        return {"count": len(results), "mean": sum(results) / len(results)}


def test_a_metric_with_several_results_per_sample_keeps_all(make_runner: Any):
    """Five samples make fifteen results; none of them is cut."""
    assert make_runner(**{**VALIDATION, "val_evaluator": Boxes()}).val() == {"count": 15, "mean": 1.0}


class Stream(IterableDataset[Any]):
    """The samples one after the other, without a length."""

    def __iter__(self) -> Any:
        samples = Samples(5)
        return (samples[index] for index in range(5))


def test_a_stream_without_a_length_is_evaluated(make_runner: Any):
    """Its size is not needed."""

    class Watching(Numbers):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results += data_samples["numbers"].tolist()

    validation = {"val_dataloader": {"dataset": Stream(), "batch_size": 2}, "val_evaluator": Watching(), "val_cfg": {}}
    assert make_runner(**validation).val() == {"own/numbers": (0, 1, 2, 3, 4), "own/count": 5}


def test_how_a_loader_is_divided_is_logged_once(make_runner: Any, capfd: pytest.CaptureFixture[str]):
    """One line per loader, with its order."""
    runner = make_runner(**VALIDATION, log_level="INFO")
    runner.train()
    runner.val()
    log = capfd.readouterr().err
    assert log.count("Training data: 13 samples of Samples in the order of DefaultSampler, batches of 2") == 1
    assert log.count("Validation data: 5 samples of Samples in the order of DefaultSampler, batches of 2") == 1


class Adjusted(BaseMetric):
    """A metric that changes what ``evaluate`` returns, with the one argument that MMEngine's has."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1.0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"count": float(len(results))}

    def evaluate(self, size: int | None) -> dict[str, float]:
        return {**super().evaluate(size), "adjusted": 1.0}


def test_a_metric_may_override_evaluate() -> None:
    """The override is called with the size alone, as in MMEngine, and all results count."""
    evaluator = Evaluator(Adjusted())
    evaluator.process(None, None)
    evaluator.process(None, None)
    assert evaluator.evaluate(by_batch=True) == {"count": 2.0, "adjusted": 1.0}
