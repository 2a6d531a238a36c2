"""A signal that comes while something else than an iteration is under way."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import EPOCH, VALIDATION, At, Recorder

from ranks import Ranks
from stratagem import Runner
from stratagem.checkpoint import find_latest_checkpoint
from stratagem.dist import Agreement, get_rank
from stratagem.train import Hook
from stratagem.train.interrupt import Interrupt
from stratagem.train.signals import signals

MakeRunner = Callable[..., Runner]


class SignalIn(Hook):
    """Sends SIGTERM to this process when an event comes, once."""

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


def test_a_signal_during_a_validation_breaks_it_off(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The run that goes on validates again, and is the undisturbed one to the last bit."""
    whole, pieces = Recorder(), Recorder()
    make_runner(custom_hooks=[whole], work_dir=tmp_path / "whole", **VALIDATION).train()
    first = make_runner(custom_hooks=[pieces, SignalIn("after_val_iter")], **VALIDATION)
    first.train()
    assert (first.interrupted, first.run.iter, pieces.metrics) == (signal.SIGTERM, EPOCH, [])
    make_runner(custom_hooks=[pieces], resume=True, **VALIDATION).train()
    assert pieces.rows == whole.rows
    assert pieces.metrics == whole.metrics


def test_a_signal_during_a_save_lets_it_be_published(make_runner: MakeRunner, tmp_path: Path) -> None:
    """And the run ends at the next boundary, with a checkpoint of that."""
    hooks = {"checkpoint": {"interval": 2, "by_epoch": False}}
    runner = make_runner(custom_hooks=[SignalIn("before_save_checkpoint")], default_hooks=hooks)
    runner.train()
    assert runner.run.iter == 2
    assert find_latest_checkpoint(runner.strategy.work_dir) == tmp_path / "run" / "iter_2"


def test_a_signal_before_the_first_iteration_ends_the_run_there(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Nothing is trained, so nothing is saved, and the next start begins as this one did."""
    runner = make_runner(custom_hooks=[SignalIn("before_run")])
    runner.train()
    assert (runner.interrupted, runner.run.iter) == (signal.SIGTERM, 0)
    assert find_latest_checkpoint(tmp_path / "run") is None


def test_a_signal_in_another_start_counts_no_more(make_runner: MakeRunner) -> None:
    """A runner that was interrupted trains on when it is asked again."""
    runner = make_runner(custom_hooks=[At(3, lambda run: os.kill(os.getpid(), signal.SIGINT))])
    runner.train()
    assert runner.run.iter == 3
    runner.train()
    assert (runner.interrupted, runner.run.iter) == (None, 3 * EPOCH)


def agreed() -> list[int]:
    """Ask three times, with a number on rank 1 in the second; return the answers."""
    agreement = Agreement()
    answers = [agreement.answer()]
    for number in (0, 15 * get_rank(), 0):
        agreement.ask(number)
        answers.append(agreement.answer())
    return answers


def test_ranks_agree_on_the_greatest_number(ranks: Ranks) -> None:
    """What one rank puts in, all read from the same question; without a question there is no answer to wait for."""
    assert ranks.run(agreed) == [[0, 0, 15, 0]] * 2


def when_noticed(*, now: bool) -> list[bool]:
    """Let rank 1 alone hear a signal after the second of four boundaries; return what each boundary says."""
    interrupt = Interrupt(distributed=True)
    said = []
    with interrupt.listening():
        for boundary in range(4):
            if boundary == 2 and get_rank() == 1:
                signals.first = int(signal.SIGTERM)
            said.append(interrupt.due_now() if now else interrupt.due())
    return said


@pytest.mark.parametrize(("now", "said"), [(False, [False, False, False, True]), (True, [False, False, True, True])])
def test_a_boundary_tells_what_was_known_at_the_one_before(ranks: Ranks, *, now: bool, said: list[bool]) -> None:
    """So nobody waits for an exchange; where the ranks decide now, each waits for the slowest."""
    assert ranks.run(when_noticed, now=now) == [said] * 2
