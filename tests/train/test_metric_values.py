"""Everything that reads a metric accepts the same kinds of scalars, and a validation may return no value."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stratagem import Runner
from stratagem.errors import ConfigKeyError, ConfigTypeError
from stratagem.logging import ScalarSmoother
from stratagem.train import BaseMetric
from tests.train.toys import EPOCH, QUIET_HOOKS, VALIDATION

MakeRunner = Callable[..., Runner]

# The readers of a metric: the arguments of a runner, and whether the run has read five equal values of the metric "acc".
READERS: dict[str, tuple[dict[str, Any], Callable[[Runner], bool]]] = {
    "early stopping": (
        {"custom_hooks": [{"type": "EarlyStoppingHook", "monitor": "acc", "patience": 2}]},
        lambda runner: runner.run.epoch == 3,
    ),
    "save_best": (
        {"default_hooks": {**QUIET_HOOKS, "checkpoint": {"save_best": "acc"}}},
        lambda runner: (Path(runner.strategy.work_dir) / "best_acc_epoch_1").is_dir(),
    ),
    "plateau": (
        {"param_scheduler": {"type": "ReduceOnPlateauLR", "monitor": "acc", "rule": "greater", "patience": 0}},
        lambda runner: runner.strategy.optim_wrapper.get_lr()["lr"][0] < 0.1,
    ),
}
KINDS = {
    "float": float,
    "int": int,
    "bool": bool,
    "decimal": Decimal,
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "bool_": np.bool_,
    "array of no dimension": np.array,
    "array of one element": lambda value: np.array([[value]]),
    "tensor of no dimension": torch.tensor,
    "tensor of one element": lambda value: torch.tensor([value]),
    "bfloat16": lambda value: torch.tensor([[value]], dtype=torch.bfloat16),
    "parameter": lambda value: torch.tensor(float(value), requires_grad=True),
}


class Given(BaseMetric):
    """Returns the given metrics, one mapping for each validation."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        super().__init__()
        self.given = list(results)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return self.given.pop(0)


def train(make_runner: MakeRunner, results: list[dict[str, Any]], **changes: Any) -> Runner:
    """Train for one epoch per validation result."""
    runner = make_runner(
        **{**VALIDATION, "val_evaluator": Given(results), "train_cfg": {"max_epochs": len(results)}, **changes}
    )
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_scalar_of_any_kind_is_a_metric(make_runner: MakeRunner, reader: str, kind: str):
    """Early stopping, ``save_best`` and plateau schedules read the same number, whatever its type."""
    changes, has_read = READERS[reader]
    assert has_read(train(make_runner, [{"acc": KINDS[kind](1)}] * 5, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2), r"torch.Tensor of shape \(2,\)"),
        (np.zeros((1, 3)), r"numpy.ndarray of shape \(1, 3\)"),
        (torch.tensor(1j), "complex64"),
        ("0.5", "a str; expected"),
        ([0.5], "a list; expected"),
        (None, "a NoneType; expected"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_metric_that_is_not_a_scalar_is_refused(make_runner: MakeRunner, reader: str, value: Any, text: str):
    """The error names the metric, the type and the shape."""
    with pytest.raises(ConfigTypeError, match=rf"'acc' is .*{text}"):
        train(make_runner, [{"acc": value}], **READERS[reader][0])


@pytest.mark.parametrize("kind", KINDS)
def test_logged_values_are_scalars_of_any_kind(kind: str):
    """The mean of logged values includes each scalar."""
    smoother = ScalarSmoother(4)
    smoother.append({"acc": KINDS[kind](1), "text": "ignored"})
    smoother.append({"acc": KINDS[kind](0)})
    assert smoother.means() == {"acc": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_metric_is_a_number(make_runner: MakeRunner, kind: str):
    """Records contain one number for each scalar, not a list or a text."""
    runner = train(make_runner, [{"acc": KINDS[kind](1)}], default_hooks={**QUIET_HOOKS, "logger": {}})
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    (record,) = [record for record in map(json.loads, lines) if record["mode"] == "val"]
    assert record["acc"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_run_continues_after_a_validation_without_metrics(
    make_runner: MakeRunner, reader: str, capfd: pytest.CaptureFixture[str]
):
    """A detector that finds nothing in its first epoch returns no metrics; the run warns and reads the next ones."""
    changes, _ = READERS[reader]
    runner = train(make_runner, [{}, {"acc": 0.1}, {}, {"acc": 0.3}], **changes, log_level="WARNING")
    assert runner.run.iter == 4 * EPOCH
    assert "acc" in capfd.readouterr().err
    if reader == "save_best":
        assert (Path(runner.strategy.work_dir) / "best_acc_epoch_4").is_dir()


@pytest.mark.slow
def test_the_first_metric_is_chosen_when_there_is_one(make_runner: MakeRunner):
    """With ``save_best="auto"``, a validation without metrics does not determine the metric."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"save_best": "auto"}}
    runner = train(make_runner, [{}, {"acc": 0.1}], default_hooks=hooks)
    assert (Path(runner.strategy.work_dir) / "best_acc_epoch_2").is_dir()


@pytest.mark.parametrize("reader", ["save_best", "plateau"])
def test_an_unknown_metric_beside_others_is_refused(make_runner: MakeRunner, reader: str):
    """A misspelled name is an error in the first validation that returns metrics."""
    with pytest.raises(ConfigKeyError, match="accuracy"):
        train(make_runner, [{}, {"accuracy": 0.1}], **READERS[reader][0])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["save_best", "plateau"])
def test_a_known_metric_may_be_missing_beside_others(make_runner: MakeRunner, reader: str):
    """A metric that an earlier validation returned is not misspelled, so the run continues without it."""
    runner = train(make_runner, [{"acc": 0.1, "size": 1}, {"size": 1}, {"acc": 0.2}], **READERS[reader][0])
    assert runner.run.epoch == 3


@pytest.mark.slow
def test_a_validation_without_metrics_does_not_count_towards_the_patience_of_a_plateau(make_runner: MakeRunner):
    """With a patience of one, the value is reduced after two bad validations; validations without metrics do not count."""
    plateau = {"type": "ReduceOnPlateauLR", "monitor": "acc", "rule": "greater", "patience": 1}
    # The validation after the last epoch is not counted.
    results = [{"acc": 0.5}, {}, {}, {"acc": 0.5}, {}]
    assert train(make_runner, results, param_scheduler=plateau).strategy.optim_wrapper.get_lr()["lr"] == [0.1]
    results.insert(4, {"acc": 0.5})
    again = train(make_runner, results, param_scheduler=plateau)
    assert again.strategy.optim_wrapper.get_lr()["lr"] == [pytest.approx(0.01)]
