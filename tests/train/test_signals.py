import os
import signal
import threading

import pytest
import torch

from stratagem.train import signals
from stratagem.train.signals import Interrupt


def send(number: int = signal.SIGINT) -> None:
    """Send this process a signal, as the terminal or a scheduler does."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_until_the_iteration_ends(number: int):
    """Ctrl-C and a scheduler's SIGTERM both ask to stop; nothing is torn."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        assert not interrupt.due(1)
        send(number)
        assert interrupt.received is None
        assert interrupt.due(2)
    assert interrupt.received == number


def test_the_handlers_come_back():
    """After the training Ctrl-C does what it did before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt(distributed=False).listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_same_request_may_come_twice(monkeypatch: pytest.MonkeyPatch):
    """A launcher passes on what the terminal has sent already; one that comes later stops at once."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        send()
        now[0] += 0.5
        send()
        assert interrupt.due(1)
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            send()


def test_ranks_agree_every_ten_iterations(monkeypatch: pytest.MonkeyPatch):
    """A signal that came to another rank stops this one after the same iteration."""
    asked = []

    def all_reduce(tensor: torch.Tensor, op: str) -> None:
        assert op == "max"
        asked.append(tensor.item())
        tensor.fill_(signal.SIGTERM)

    monkeypatch.setattr(signals, "all_reduce", all_reduce)
    interrupt = Interrupt(distributed=True)
    assert [iteration for iteration in range(1, 11) if interrupt.due(iteration)] == [10]
    assert asked == [0]
    assert interrupt.received == signal.SIGTERM


def test_a_rank_does_nothing_about_a_signal_that_the_others_do_not_know_of(monkeypatch: pytest.MonkeyPatch):
    """It would skip a validation, or save, and wait for the others for ever."""
    monkeypatch.setattr(signals, "all_reduce", lambda *_: None)
    interrupt = Interrupt(distributed=True)
    with interrupt.listening():
        send()
        assert not interrupt.due(9)
        assert interrupt.received is None
        assert interrupt.due(10)
        assert interrupt.received == signal.SIGINT


def test_listening_again_forgets_the_last_request():
    """So that a run that was interrupted can go on in the same process."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        send()
        assert interrupt.due(1)
    with interrupt.listening():
        assert not interrupt.due(2)
        assert interrupt.received is None


def test_another_thread_trains_without_listening():
    """Python gives signals to the main thread alone, so handlers stay as they are."""
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def train() -> None:
        with Interrupt(distributed=False).listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]
