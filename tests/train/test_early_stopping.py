"""Training stops early if a metric no longer improves, also after a resume."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train import EarlyStoppingHook
from tests.train.test_train_schedules import Scripted
from tests.train.toys import EPOCH, VALIDATION, At, Recorder, train_until_signal

MakeRunner = Callable[..., Runner]


def epochs_trained(make_runner: MakeRunner, values: list[float], **options: Any) -> int:
    """Train for as many epochs as there are metric values and return the epoch at which the run stopped."""
    hook = EarlyStoppingHook(**{"monitor": "loss", **options})
    runner = make_runner(
        custom_hooks=[hook],
        **{**VALIDATION, "val_evaluator": Scripted(values)},
        train_cfg={"max_epochs": len(values)},
    )
    runner.train()
    return runner.run.epoch


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [
        # The second and third values improve on 1.0 by less than 0.2.
        ([1.0, 0.85, 0.84, 0.83, 0.82], {"patience": 2, "min_delta": 0.2}, 3),
        # By default, any improvement counts.
        ([1.0, 0.999, 0.998, 0.998, 0.998, 0.1], {"patience": 2}, 5),
        ([1.0, 0.7, 0.69, 0.4, 0.39, 0.38, 0.1], {"patience": 2, "min_delta": 0.2}, 6),
        ([1.0, 2.0, 1.5, 2.5], {"patience": 1, "rule": "greater", "min_delta": 0.5}, 3),
        ([1.0, 0.9, 0.8], {"patience": 1, "min_delta": 0.0}, 3),
        ([1.0, 0.5, 0.2, 0.1], {"stopping_threshold": 0.2, "patience": 9}, 3),
        ([1.0, 2.0, 3.0, 4.0], {"rule": "greater", "stopping_threshold": 3.0, "patience": 9, "min_delta": 0.0}, 3),
        ([1.0, math.nan, 0.1], {"patience": 9}, 2),
        ([1.0, math.inf, 0.1], {"patience": 9}, 2),
        ([math.nan, 1.0, 0.5, 0.1], {"patience": 2, "check_finite": False, "min_delta": 0.2}, 4),
        ([math.nan, math.nan, 0.5], {"patience": 2, "check_finite": False}, 2),
    ],
)
def test_training_stops_when_the_metric_no_longer_improves(
    make_runner: MakeRunner, values: list[float], options: Any, ends: int
):
    """The run stops after the expected epoch, which was determined by hand from the metrics of all validations."""
    assert epochs_trained(make_runner, values, **options) == ends


@pytest.mark.slow
def test_a_resumed_run_stops_at_the_same_epoch(make_runner: MakeRunner, tmp_path: Path):
    """After a resume, the two earlier validations without improvement count toward the patience of three."""

    def run(values: list[float], *hooks: Any, **changes: Any) -> Runner:
        runner = make_runner(
            custom_hooks=[EarlyStoppingHook("loss", patience=3, min_delta=0.0), *hooks],
            **{**VALIDATION, "val_evaluator": Scripted(values)},
            train_cfg={"max_epochs": 8},
            **changes,
        )
        train_until_signal(runner)
        return runner

    values = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9]
    recorder, interrupt = Recorder(), At(4 * EPOCH + 2, lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert run(values, work_dir=tmp_path / "whole").run.epoch == 5
    assert run(values, interrupt, recorder).interrupted == signal.SIGINT
    again = run(values[4:], recorder, resume=True)
    assert again.run.epoch == 5
    assert len(recorder.rows) == 5 * EPOCH


@pytest.mark.parametrize(("strict", "error"), [(True, TrainingError), (False, None)])
def test_a_missing_metric(make_runner: MakeRunner, strict: bool, error: Any):
    """With ``strict`` a missing metric raises an error that suggests the closest name; otherwise training continues."""
    if error is None:
        assert epochs_trained(make_runner, [1.0, 2.0], monitor="los", rule="less", strict=strict) == 2
        return
    with pytest.raises(error, match="'los' is missing. Did you mean 'loss'"):
        epochs_trained(make_runner, [1.0, 2.0], monitor="los", rule="less", strict=strict)


@pytest.mark.parametrize(
    ("name", "rule"), [("accuracy", "greater"), ("coco/bbox_mAP", "greater"), ("loss", "less"), ("val_Loss", "less")]
)
def test_the_rule_is_inferred_from_known_names(make_runner: MakeRunner, name: str, rule: str):
    """The rule is inferred from the name of the metric, regardless of its case and of the position of the key."""
    hook, reported = EarlyStoppingHook(name), EarlyStoppingHook(name, rule)
    for value in (1.0, 2.0, 3.0, 1.0):
        assert hook._update(value) == reported._update(value)
        assert hook.state_dict() == reported.state_dict()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"monitor": "quality"}, "from the name 'quality' whether greater or smaller"),
        ({"monitor": "loss", "rule": "lesser"}, "Did you mean 'less'"),
        ({"monitor": "loss", "patience": 0}, "expected patience to be an integer >= 1, got 0"),
        ({"monitor": "loss", "min_delta": -1.0}, "expected min_delta >= 0, got -1.0"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, Any], text: str):
    """Invalid arguments raise an error that shows the value and the expected one."""
    with pytest.raises(ConfigValueError, match=text):
        EarlyStoppingHook(**options)
