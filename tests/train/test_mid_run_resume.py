import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from tests.train.test_train_schedules import PLATEAU, Scripted
from tests.train.toys import EPOCH, SAMPLES, VALIDATION, At, Recorder, loader, stop, train_until_signal

MakeRunner = Callable[..., Runner]

EPOCHS = {
    "train_cfg": {"by_epoch": True, "max_epochs": 3},
    "param_scheduler": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10},
        {"type": "StepLR", "step_size": 1, "gamma": 0.5},
    ],
}
ITERATIONS = {
    "train_cfg": {"by_epoch": False, "max_iters": 17, "val_interval": 5},
    "param_scheduler": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10},
        {"type": "ExponentialLR", "gamma": 0.9, "by": "step"},
    ],
}


def interrupt(run: Any) -> None:
    """Send SIGINT, like Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def outcome(runner: Runner, recorder: Recorder) -> tuple[list, list, dict]:
    """Return the recorded iterations and metrics, and the final weights."""
    return recorder.rows, recorder.metrics, runner.strategy.model_state_dict()


def assert_same(found: tuple[list, list, dict], expected: tuple[list, list, dict]) -> None:
    """Require identical bits: epochs, batches, samples, learning rates and losses, metrics, and weights."""
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert all(torch.equal(found[2][name], value) for name, value in expected[2].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        *[(EPOCHS, (stop,)) for stop in (1, 4, EPOCH, 10, 2 * EPOCH - 1, 2 * EPOCH, 20, 3 * EPOCH)],
        (EPOCHS, (3, 5, EPOCH, EPOCH + 1)),
        *[(ITERATIONS, (stop,)) for stop in (1, 5, EPOCH, 9, 14, 16, 17)],
        (ITERATIONS, (2, 10, 11)),
    ],
    ids=lambda value: {id(EPOCHS): "epochs", id(ITERATIONS): "iterations"}.get(id(value), str(value)),
)
def test_a_run_that_is_interrupted_anywhere_and_resumed_is_bit_identical(
    make_runner: MakeRunner, tmp_path: Path, kind: dict, stops: tuple[int, ...]
):
    """An interrupted and resumed run is bit-identical, with dropout, shuffling, momentum, validation and schedules."""
    recorder = Recorder()
    runner = make_runner(work_dir=tmp_path / "whole", custom_hooks=[recorder], **kind, **VALIDATION)
    runner.train()
    whole = outcome(runner, recorder)

    pieces = Recorder()
    for iteration in stops:
        runner = make_runner(custom_hooks=[pieces, At(iteration, interrupt)], resume=True, **kind, **VALIDATION)
        train_until_signal(runner)
        assert runner.interrupted == signal.SIGINT
        assert runner.latest_checkpoint() == tmp_path / "run" / f"iter_{iteration}"
    runner = make_runner(custom_hooks=[pieces], resume=True, **kind, **VALIDATION)
    runner.train()
    assert runner.interrupted is None
    assert_same(outcome(runner, pieces), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, EPOCH, 12])
def test_a_run_can_resume_from_any_checkpoint(make_runner: MakeRunner, tmp_path: Path, number: int):
    """Every regular checkpoint can be resumed like that of an interruption."""
    hooks = {"runtime_info": None, "logger": None, "checkpoint": {"by_epoch": False, "interval": 1}}
    whole = Recorder()
    first = make_runner(custom_hooks=[whole], default_hooks=hooks, **EPOCHS)
    first.train()
    rest = Recorder()
    runner = make_runner(
        work_dir=tmp_path / "rest", custom_hooks=[rest], resume=tmp_path / "run" / f"iter_{number}", **EPOCHS
    )
    runner.train()
    assert rest.rows == whole.rows[number:]
    expected = first.strategy.model_state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in runner.strategy.model_state_dict().items())


@pytest.mark.slow
def test_a_missed_validation_is_run_after_resuming(make_runner: MakeRunner):
    """A missed validation is run after resuming, because a plateau schedule depends on it."""
    epochs = {"param_scheduler": PLATEAU, "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 1.0}}}

    def validation(*values: float) -> dict[str, Any]:
        return {**VALIDATION, "val_evaluator": Scripted(list(values))}

    recorder = Recorder()
    train_until_signal(make_runner(custom_hooks=[recorder, At(2 * EPOCH, interrupt)], **epochs, **validation(1.0)))
    make_runner(custom_hooks=[recorder], resume=True, **epochs, **validation(1.0, 0.5)).train()
    assert [iteration for iteration, _ in recorder.metrics] == [7, 14, 21]
    assert recorder.rates == [1.0] * 14 + [0.5] * 7


def test_a_completed_validation_is_not_repeated(make_runner: MakeRunner, tmp_path: Path):
    """A validation is not repeated if the checkpoint was saved after it."""

    class SaveAfterValidation(Recorder):
        def after_val(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / "validated", run.progress.here())

    make_runner(custom_hooks=[SaveAfterValidation()], train_cfg={"max_epochs": 1}, **VALIDATION).train()
    recorder = Recorder()
    make_runner(
        custom_hooks=[recorder], resume=tmp_path / "validated", train_cfg={"max_epochs": 2}, **VALIDATION
    ).train()
    assert [iteration for iteration, _ in recorder.metrics] == [14]


@pytest.mark.slow
def test_resuming_a_complete_run_trains_nothing_and_validates(make_runner: MakeRunner):
    """Resuming a complete run trains nothing and validates once."""
    hooks = {"runtime_info": None, "logger": None}
    first, again = Recorder(), Recorder()
    make_runner(custom_hooks=[first], default_hooks=hooks, **EPOCHS, **VALIDATION).train()
    runner = make_runner(custom_hooks=[again], default_hooks=hooks, resume=True, **EPOCHS, **VALIDATION)
    runner.train()
    assert again.rows == []
    assert again.metrics == first.metrics[-1:]
    assert (runner.run.epoch, runner.run.iter) == (3, 21)


@pytest.mark.slow
def test_a_complete_run_can_be_extended(make_runner: MakeRunner):
    """Increasing max_epochs trains the additional epochs."""
    hooks = {"runtime_info": None, "logger": None}
    recorder = Recorder()
    make_runner(default_hooks=hooks, train_cfg={"max_epochs": 1}).train()
    make_runner(default_hooks=hooks, custom_hooks=[recorder], resume=True, train_cfg={"max_epochs": 2}).train()
    assert [row[:2] for row in recorder.rows] == [(1, batch) for batch in range(7)]


def test_the_seed_of_the_checkpoint_determines_the_order(make_runner: MakeRunner):
    """The order of the samples depends on the seed of the checkpoint, even if the configuration has a different one."""
    recorder = Recorder()
    train_until_signal(make_runner(custom_hooks=[recorder, At(3, interrupt)]))
    runner = make_runner(custom_hooks=[recorder], resume=True, randomness={"seed": 99}, train_cfg={"max_epochs": 1})
    runner.train()
    assert sorted(n for row in recorder.rows for n in row[2]) == list(range(13))
    assert runner.strategy.seed == 3


def test_a_stop_by_a_hook_saves_no_checkpoint(make_runner: MakeRunner, tmp_path: Path):
    """A hook that stops the run does not save a checkpoint; only a signal does."""
    runner = make_runner(custom_hooks=[At(3, stop)])
    runner.train()
    assert runner.interrupted is None
    assert runner.latest_checkpoint() is None


def test_an_interrupted_run_can_continue_in_the_same_process(make_runner: MakeRunner):
    """An interrupted run can continue in the same process with ``train``."""
    recorder = Recorder()
    runner = make_runner(custom_hooks=[recorder, At(4, interrupt)], train_cfg={"max_epochs": 1})
    train_until_signal(runner)
    assert (runner.interrupted, len(recorder.rows)) == (signal.SIGINT, 4)
    runner.train()
    assert (runner.interrupted, len(recorder.rows)) == (None, EPOCH)
    assert sorted(n for row in recorder.rows for n in row[2]) == list(range(13))


@pytest.mark.slow
def test_an_epoch_can_resume_with_a_different_batch_size(make_runner: MakeRunner) -> None:
    """After three batches of 2, an epoch that is resumed with batches of 3 contains each sample exactly once."""
    seen = Recorder()
    train_until_signal(make_runner(custom_hooks=[seen, At(3, interrupt)], resume=True))
    runner = make_runner(custom_hooks=[seen, At(6, interrupt)], resume=True, train_dataloader=loader(batch_size=3))
    train_until_signal(runner)
    first_epoch = [number for row in seen.rows if row[0] == 0 for number in row[2]]
    assert sorted(first_epoch) == list(range(SAMPLES))
    assert [len(row[2]) for row in seen.rows[:6]] == [2, 2, 2, 3, 3, 1]
