"""Handle signals that request a run to stop, without interrupting the current iteration."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

from stratagem.train.run.hard_exit import exit_now
from stratagem.utils.processes import child_processes, continue_stopped

__all__ = ["PREEMPTION_SIGNALS", "SIGNALS", "SignalListener", "signals"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# SLURM sends this signal before the end of a job with `--signal=USR1@seconds`. The signal does not exist on Windows.
PREEMPTION_SIGNALS = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
SIGNALS = (*_STOP_SIGNALS, *PREEMPTION_SIGNALS)
# A launcher forwards a signal that the process has already received from the terminal or the scheduler; a repetition
# within this time is not a second request.
_SAME_REQUEST_S = 1.0
# The time that the main thread may take to clean up after a second signal before the process is forced to exit.
_SHUTDOWN_GRACE_S = 3.0
_END = 0  # no signal has this number


@final
class SignalListener:
    """Stores the first signal that this process receives; a second one stops the process immediately.

    A thread receives the signals through ``signal.set_wakeup_fd``. Python's handlers run in the main thread, which may be blocked
    in a collective operation with a rank that never responds.

    Attributes:
        first: the number of the first signal; None before the first, and outside :meth:`listening`.
        second: the number of the signal that stops the process immediately.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.second: int | None = None
        self._handlers: dict[int, object] = {}
        self._stop = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals for the duration of the context, and restore the previous handlers afterwards.

        A nested context, and a context outside the main thread, where Python cannot install handlers, does nothing.
        """
        if self._handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.first = self.second = None
        self._stop = threading.Event()
        source, sink = os.pipe()
        if hasattr(os, "set_blocking"):  # Windows does not need this; Python 3.12 added the function there
            os.set_blocking(sink, False)
        taken = [number for number in SIGNALS if number in _STOP_SIGNALS or signal.getsignal(number) is signal.SIG_DFL]
        thread = threading.Thread(target=self._hear, args=(source,), name="stratagem-signals", daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._in_main_thread) for number in taken}
        try:
            yield
        finally:
            handlers, self._handlers = self._handlers, {}
            for number, handler in handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]  # returned by signal.signal
            signal.set_wakeup_fd(wakeup)
            self._stop.set()
            os.write(sink, bytes([_END]))
            thread.join()
            os.close(source)
            os.close(sink)
            # Another run that is training in a different thread also reads these attributes, and a handled signal must not
            # stop it.
            self.first = self.second = None

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.second is not None:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = number

    def _hear(self, source: int) -> None:
        since: float | None = None
        while not self._stop.is_set():
            for number in os.read(source, 64):
                if number not in self._handlers or self.second is not None:
                    continue
                now = time.monotonic()
                self.first = self.first or number
                if since is None:
                    since = now
                    # The current iteration may be waiting for a batch of a stopped data worker.
                    continue_stopped(child_processes(os.getpid()))
                if now - since > _SAME_REQUEST_S:
                    self.second = number
                    threading.Thread(target=self._stop_at_once, args=(number, self._stop), daemon=True).start()

    @staticmethod
    def _stop_at_once(number: int, stop: threading.Event) -> None:
        """Raise KeyboardInterrupt in the main thread; force the process to exit if it is blocked."""
        _thread.interrupt_main(signal.Signals(number))
        if not stop.wait(_SHUTDOWN_GRACE_S):
            exit_now(128 + number, f"received a second signal ({number}): exiting immediately")

    def reset_in_child(self) -> None:
        """Reset the signal handling in a forked child, which would otherwise write its signals to the pipe of its parent.

        Signals to the whole process group are handled by the parent, so the child ignores all of them except SIGTERM.
        """
        if self._handlers:
            handlers, self._handlers = self._handlers, {}
            signal.set_wakeup_fd(-1)
            for number in handlers:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


# Signals are received per process, so there is one listener per process.
signals = SignalListener()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=signals.reset_in_child)
