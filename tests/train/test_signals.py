import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stratagem.train.run.interrupt import Interrupt
from stratagem.train.run.signals import SIGNALS, signals

if sys.platform == "win32":
    pytest.skip("on Windows, os.kill terminates the process", allow_module_level=True)


def send(number: int = signal.SIGINT) -> None:
    """Send a signal to this process, like a terminal or a scheduler."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_takes_effect_at_the_end_of_the_iteration(number: int):
    """SIGINT, SIGTERM and SIGUSR1 stop the run at the end of the iteration."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        assert not interrupt.due()
        send(number)
        assert interrupt.received is None
        assert interrupt.due()
    assert interrupt.received == number


def test_the_handlers_are_restored():
    """The signal handlers are restored after training."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.listening(), signals.listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_custom_sigusr1_handler_is_kept():
    """A program's own handler for SIGUSR1 is kept; only signals that would terminate the process are handled."""

    def own(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, own)
    try:
        with signals.listening():
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_forwarded_signal_is_ignored():
    """A signal that a launcher forwards again is ignored."""
    with signals.listening():
        send()
        send()
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert signals.second is None


@pytest.mark.slow
def test_a_second_signal_stops_immediately():
    """A second signal, at least a second after the first, raises KeyboardInterrupt immediately."""
    with signals.listening():
        send(signal.SIGTERM)
        time.sleep(1.1)  # an earlier one would count as the same request
        with pytest.raises(KeyboardInterrupt):
            send_and_wait(signal.SIGTERM)
        assert signals.second == signal.SIGTERM


def send_and_wait(number: int) -> None:
    """Send a signal and run Python code until it is interrupted."""
    send(number)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        pass


@pytest.mark.slow
def test_a_second_signal_ends_a_blocked_process():
    """If the main thread is blocked, the second signal ends the process with the exit code of the signal."""
    source = (
        "import ctypes\n"
        "from stratagem.train.run.signals import signals\n"
        "with signals.listening():\n"
        "    print('ready', flush=True)\n"
        # It waits again after each signal, like a collective with a missing rank.
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
        _, reported = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGTERM
        assert "received a second signal" in reported
    finally:
        process.kill()
        process.communicate()


def test_a_forked_child_does_not_report_signals(recwarn: pytest.WarningsRecorder):
    """Signals to a data worker do not stop the run, and SIGTERM ends the worker."""
    with signals.listening():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.05)  # the thread would have received it by now
        assert signals.first is None


def test_a_new_training_clears_the_previous_signal():
    """A new training clears the previous signal."""
    interrupt = Interrupt(distributed=False)
    with interrupt.listening():
        send()
        assert interrupt.due()
    with interrupt.listening():
        assert not interrupt.due()
        assert interrupt.received is None


def test_training_in_a_different_thread_does_not_change_handlers():
    """In other threads, the handlers are not changed, because Python only delivers signals to the main thread."""
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def train() -> None:
        with Interrupt(distributed=False).listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]
