"""Signals that arrive outside an iteration."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.checkpoint import find_latest_checkpoint
from stratagem.dist import AsyncMaxReduce, barrier, get_rank
from stratagem.train import Hook
from stratagem.train.run.interrupt import Interrupt
from stratagem.train.run.run_history import read_record
from stratagem.train.run.signals import signals
from tests.support.ranks import Ranks
from tests.train.toys import EPOCH, VALIDATION, At, EventLog, Recorder, stop, train_until_signal

if sys.platform == "win32":
    pytest.skip("on Windows, os.kill terminates the process", allow_module_level=True)

MakeRunner = Callable[..., Runner]


class SignalIn(Hook):
    """A hook that sends SIGTERM to this process at the first call of an event."""

    def __init__(self, event: str) -> None:
        self.event = event
        self.sent = False

    def get_triggered_stages(self) -> list[str]:
        return [self.event]

    def __getattribute__(self, name: str) -> Any:
        if name != "event" and name == self.event:
            return self._send
        return super().__getattribute__(name)

    def _send(self, *_: Any, **__: Any) -> None:
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_during_a_validation_aborts_it(make_runner: MakeRunner, tmp_path: Path) -> None:
    """A signal during a validation aborts it; the resumed run validates again and is bit-identical."""
    whole, pieces = Recorder(), Recorder()
    make_runner(custom_hooks=[whole], work_dir=tmp_path / "whole", **VALIDATION).train()
    first = make_runner(custom_hooks=[pieces, SignalIn("after_val_iter")], **VALIDATION)
    train_until_signal(first)
    assert (first.interrupted, first.run.iter, pieces.metrics) == (signal.SIGTERM, EPOCH, [])
    make_runner(custom_hooks=[pieces], resume=True, **VALIDATION).train()
    assert pieces.rows == whole.rows
    assert pieces.metrics == whole.metrics


def test_a_signal_during_a_save_lets_it_finish(make_runner: MakeRunner, tmp_path: Path) -> None:
    """If a signal arrives during a save, the save completes, and the run ends at the next boundary with another checkpoint."""
    hooks = {"checkpoint": {"interval": 2, "by_epoch": False}}
    runner = make_runner(custom_hooks=[SignalIn("before_save_checkpoint")], default_hooks=hooks)
    train_until_signal(runner)
    assert runner.run.iter == 2
    assert find_latest_checkpoint(runner.strategy.work_dir) == tmp_path / "run" / "iter_2"


def test_a_signal_before_the_first_iteration_ends_the_run_there(make_runner: MakeRunner, tmp_path: Path) -> None:
    """A signal before the first iteration ends the run without a checkpoint."""
    runner = make_runner(custom_hooks=[SignalIn("before_run")])
    train_until_signal(runner)
    assert (runner.interrupted, runner.run.iter) == (signal.SIGTERM, 0)
    assert find_latest_checkpoint(tmp_path / "run") is None


def test_a_signal_in_an_earlier_training_is_cleared(make_runner: MakeRunner) -> None:
    """An interrupted runner can train again in the same process."""
    runner = make_runner(custom_hooks=[At(3, lambda run: os.kill(os.getpid(), signal.SIGINT))])
    train_until_signal(runner)
    assert runner.run.iter == 3
    runner.train()
    assert (runner.interrupted, runner.run.iter) == (None, 3 * EPOCH)


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, None),
        (signal.SIGTERM, SystemExit, 128 + 15),
        (signal.SIGUSR1, SystemExit, 128 + signal.SIGUSR1),
    ],
)
def test_an_interrupted_training_raises_after_its_checkpoint(
    make_runner: MakeRunner, tmp_path: Path, number: int, error: type[BaseException], code: int | None
) -> None:
    """Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGUSR1 raise SystemExit with 128 plus their number."""
    events, handler = EventLog(), signal.getsignal(signal.SIGINT)
    runner = make_runner(custom_hooks=[At(3, lambda run: os.kill(os.getpid(), number)), events])
    with pytest.raises(error) as caught:
        runner.train()
    assert getattr(caught.value, "code", None) == code
    assert runner.interrupted == number
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "iter_3"
    assert events.names[-1] == "after_run"
    assert ended(runner) == f"stopped by {signal.Signals(number).name}"
    assert signal.getsignal(signal.SIGINT) is handler
    # The folder is unlocked, and the same runner completes the run.
    runner.train()
    assert runner.interrupted is None


def test_a_signal_stops_a_loop_over_runs(make_runner: MakeRunner, tmp_path: Path) -> None:
    """A signal stops a loop over several runs, and the surrounding code can clean up."""
    begun, cleaned = [], []

    def sweep() -> None:
        for fold in range(3):
            begun.append(fold)
            hooks = [At(2, lambda run: os.kill(os.getpid(), signal.SIGINT))] if fold == 1 else []
            try:
                make_runner(custom_hooks=hooks, work_dir=tmp_path / str(fold), train_cfg={"max_epochs": 1}).train()
            finally:
                cleaned.append(fold)

    with pytest.raises(KeyboardInterrupt):
        sweep()
    assert begun == cleaned == [0, 1]


@pytest.mark.parametrize("event", ["after_train", "after_run"])
def test_a_signal_after_the_last_iteration_raises(make_runner: MakeRunner, tmp_path: Path, event: str) -> None:
    """After the last iteration, a signal still raises, but the run is complete without another checkpoint."""
    runner = make_runner(custom_hooks=[SignalIn(event)], train_cfg={"max_epochs": 1})
    with pytest.raises(SystemExit) as caught:
        runner.train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert (runner.interrupted, runner.run.iter) == (None, EPOCH)
    assert ended(runner) == "complete"
    assert find_latest_checkpoint(tmp_path / "run") is None


def test_a_hook_that_stops_the_training_is_not_an_interruption(make_runner: MakeRunner) -> None:
    """If a hook stops the training, ``train`` returns the model as usual."""
    runner = make_runner(custom_hooks=[At(3, stop)])
    assert runner.train() is runner.strategy.model
    assert (runner.interrupted, runner.run.iter) == (None, 3)


def ended(runner: Runner) -> str:
    """Return the outcome of the last session from its record."""
    _, outcome = read_record(Path(runner.run.log_dir))
    assert outcome is not None
    return outcome.how


def agreed() -> list[int]:
    """Run three reductions, the second with a non-zero number on rank 1; return the results."""
    agreement = AsyncMaxReduce()
    answers = [agreement.wait()]
    for number in (0, 15 * get_rank(), 0):
        agreement.start(number)
        answers.append(agreement.wait())
    return answers


def test_ranks_agree_on_the_maximum(ranks: Ranks) -> None:
    """All ranks get the maximum of the same reduction; without a reduction in progress, ``wait`` returns immediately."""
    assert ranks.run(agreed) == [[0, 0, 15, 0]] * 2


def when_noticed(*, now: bool) -> list[bool]:
    """Deliver a signal to rank 1 before the third of four boundaries; return the result of each boundary."""
    interrupt = Interrupt(distributed=True)
    results = []
    with interrupt.listening():
        for boundary in range(4):
            barrier()
            if boundary == 2 and get_rank() == 1:
                signals.first = int(signal.SIGTERM)
            results.append(interrupt.due_now() if now else interrupt.due())
    return results


def test_ranks_decide_at_once_if_they_wait_for_each_other(ranks: Ranks) -> None:
    """``due_now`` returns True on every rank at the boundary at which one of them has received a signal."""
    assert ranks.run(when_noticed, now=True) == [[False, False, True, True]] * 2


@pytest.mark.slow
def test_ranks_stop_at_the_same_boundary(ranks: Ranks) -> None:
    """``due`` returns True on every rank at the same boundary, the next one at the latest."""
    first, second = ranks.run(when_noticed, now=False)
    assert first == second
    assert first in ([False, False, True, True], [False, False, False, True])
