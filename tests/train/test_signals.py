import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stratagem.train.run.interrupt import Interrupt
from stratagem.train.run.signals import SIGNALS, signals


def send(number: int = signal.SIGINT) -> None:
    """Send this process a signal, as the terminal or a scheduler does."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_until_the_iteration_ends(number: int):
    """Ctrl-C, a scheduler's SIGTERM and SLURM's SIGUSR1 ask to stop; nothing is torn."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        assert not interrupt.due()
        send(number)
        assert interrupt.received is None
        assert interrupt.due()
    assert interrupt.received == number


def test_the_handlers_come_back():
    """After the training Ctrl-C does what it did before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.listening(), signals.listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_program_that_uses_sigusr1_itself_keeps_it():
    """Such as one that prints its stacks: only what would end the process is taken."""

    def own(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, own)
    try:
        with signals.listening():
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_same_request_may_come_twice():
    """A launcher passes on what the terminal has sent already; that stops nothing at once."""
    with signals.listening():
        send()
        send()
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert signals.second is None


def test_a_later_signal_stops_at_once():
    """A second request, a second or more after the first, raises KeyboardInterrupt where the process is."""
    with signals.listening():
        send(signal.SIGTERM)
        time.sleep(1.1)  # what comes earlier is the same request
        with pytest.raises(KeyboardInterrupt):
            send_and_wait(signal.SIGTERM)
        assert signals.second == signal.SIGTERM


def send_and_wait(number: int) -> None:
    """Send a signal and be busy, in Python, until it interrupts."""
    send(number)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        pass


@pytest.mark.slow
def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck():
    """Python's handlers would never run there; the thread that hears ends the process, with the signal's status."""
    source = (
        "import ctypes\n"
        "from stratagem.train.run.signals import signals\n"
        "with signals.listening():\n"
        "    print('ready', flush=True)\n"
        # It waits again after each signal, as an exchange with a rank that is gone does.
        "    lock = ctypes.create_string_buffer(64)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.pthread_mutex_init(lock, None)\n"
        "    libc.pthread_mutex_lock(lock)\n"
        "    libc.pthread_mutex_lock(lock)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.3)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGTERM
        assert "came a second time: stopped at once" in told
    finally:
        process.kill()
        process.communicate()


def test_a_forked_child_is_deaf(recwarn: pytest.WarningsRecorder):
    """What reaches a data worker asks nothing of the run; SIGTERM, by which its parent ends it, ends it."""
    with signals.listening():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.05)  # the thread would have heard by now
        assert signals.first is None


def test_listening_again_forgets_the_last_request():
    """So that a run that was interrupted can go on in the same process."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        send()
        assert interrupt.due()
    with interrupt.listening():
        assert not interrupt.due()
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
