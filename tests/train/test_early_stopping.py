"""A training that gets no better ends, and goes on deciding so after it was resumed."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_train_schedules import Scripted
from toys import EPOCH, VALIDATION, At, Recorder, train_until_signal

from stratagem import Runner
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train import EarlyStoppingHook

MakeRunner = Callable[..., Runner]


def epochs_trained(make_runner: MakeRunner, values: list[float], **options: Any) -> int:
    """Train for as many epochs as there are values of the metric, and return after how many it ended."""
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
        # The second and the third are not better than 1.0 by more than 0.2.
        ([1.0, 0.85, 0.84, 0.83, 0.82], {"patience": 2, "min_delta": 0.2}, 3),
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
def test_it_ends_where_the_metric_says(make_runner: MakeRunner, values: list[float], options: Any, ends: int):
    """Epochs by hand; each value is that of the validation after its epoch."""
    assert epochs_trained(make_runner, values, **options) == ends


def test_a_run_that_was_resumed_stops_where_the_undisturbed_one_does(make_runner: MakeRunner, tmp_path: Path):
    """What it had seen before the interruption counts: two of three validations were waited."""

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
def test_a_metric_that_is_not_there(make_runner: MakeRunner, strict: bool, error: Any):
    """With strict an error that says which there are; else the training goes on."""
    if error is None:
        assert epochs_trained(make_runner, [1.0, 2.0], monitor="los", rule="less", strict=strict) == 2
        return
    with pytest.raises(error, match="'los' is not there. Did you mean 'loss'"):
        epochs_trained(make_runner, [1.0, 2.0], monitor="los", rule="less", strict=strict)


@pytest.mark.parametrize(
    ("name", "rule"), [("accuracy", "greater"), ("coco/bbox_mAP", "greater"), ("loss", "less"), ("val_Loss", "less")]
)
def test_known_names_tell_which_values_are_better(make_runner: MakeRunner, name: str, rule: str):
    """In any case, wherever they stand in the name."""
    hook, told = EarlyStoppingHook(name), EarlyStoppingHook(name, rule)
    for value in (1.0, 2.0, 3.0, 1.0):
        assert hook._reason(value) == told._reason(value)
        assert hook.state_dict() == told.state_dict()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"monitor": "perplexity"}, "'perplexity' does not tell which values are better"),
        ({"monitor": "loss", "rule": "lesser"}, "Did you mean 'less'"),
        ({"monitor": "loss", "patience": 0}, "patience is 0"),
        ({"monitor": "loss", "min_delta": -1.0}, "min_delta is -1.0"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], text: str):
    """One sentence each."""
    with pytest.raises(ConfigValueError, match=text):
        EarlyStoppingHook(**options)
