"""Hear the signals that ask a run to stop, while it goes on."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

from stratagem.train.run.hard_exit import exit_now

__all__ = ["PREEMPTION_SIGNALS", "SIGNALS", "SignalListener", "signals"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a SLURM job asks for with `--signal=USR1@seconds`. Windows has none, and a program may use it for something else.
PREEMPTION_SIGNALS = () if sys.platform == "win32" else (signal.SIGUSR1,)
SIGNALS = (*_STOP_SIGNALS, *PREEMPTION_SIGNALS)
# A launcher passes on the signal that the terminal or the scheduler has sent already; that is no second request.
_SAME_REQUEST_S = 1.0
# After a second request: how long the main thread may take to clean up before the process ends without that.
_SHUTDOWN_GRACE_S = 3.0
_END = 0  # no signal has this number


@final
class SignalListener:
    """Remembers the first signal that came to this process; a later one stops it at once.

    A thread hears them, by way of ``signal.set_wakeup_fd``: Python's own handlers wait for the main thread, and that may
    be inside of an exchange with a rank that will never answer.

    Attributes:
        first: the number of the first signal; None while there was none, or nothing listens.
        second: the number of the one that stops at once.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.second: int | None = None
        self._handlers: dict[int, object] = {}
        self._over = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the context lasts; the handlers that were there come back after it.

        Inside of another such context it changes nothing. Python lets only the main thread listen.
        """
        if self._handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.first = self.second = None
        self._over = threading.Event()
        source, sink = os.pipe()
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
                signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
            signal.set_wakeup_fd(wakeup)
            self._over.set()
            os.write(sink, bytes([_END]))
            thread.join()
            os.close(source)
            os.close(sink)
            # A training in another thread reads them too, and is not asked to stop by what an earlier one has answered.
            self.first = self.second = None

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.second is not None:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = number

    def _hear(self, source: int) -> None:
        since: float | None = None
        while not self._over.is_set():
            for number in os.read(source, 64):
                if number not in self._handlers or self.second is not None:
                    continue
                now = time.monotonic()
                self.first = self.first or number
                since = since or now
                if now - since > _SAME_REQUEST_S:
                    self.second = number
                    threading.Thread(target=self._stop_at_once, args=(number, self._over), daemon=True).start()

    @staticmethod
    def _stop_at_once(number: int, over: threading.Event) -> None:
        """Raise KeyboardInterrupt in the main thread; where that does not come out of what it does, end the process."""
        _thread.interrupt_main(signal.Signals(number))
        if not over.wait(_SHUTDOWN_GRACE_S):
            exit_now(128 + number, f"signal {number} came a second time: stopped at once")

    def forget_in_child(self) -> None:
        """Be deaf in a process that was forked from a listening one, which would wake its parent for its own signals.

        What the terminal or the scheduler sends to all processes of a run, the run answers; only SIGTERM ends the child.
        """
        if self._handlers:
            handlers, self._handlers = self._handlers, {}
            signal.set_wakeup_fd(-1)
            for number in handlers:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


# One for the process, as its signals are.
signals = SignalListener()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=signals.forget_in_child)
