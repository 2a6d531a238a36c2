"""Measure wall time."""

from __future__ import annotations

from time import time
from typing import Self

from stratagem.errors import StateError

__all__ = ["Timer", "TimerError", "check_time"]


class TimerError(StateError):
    """A timer that does not run was read."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class Timer:
    """A stopwatch. As a context manager, it prints the time since it was last read at the end of the block.

    Args:
        start: whether to start it now.
        print_tmpl: the text to print, with a place for the seconds; ``"{:.3f}"`` by default.
    """

    def __init__(self, start: bool = True, print_tmpl: str | None = None) -> None:
        self._is_running = False
        self.print_tmpl = print_tmpl or "{:.3f}"
        self._start = self._last = 0.0
        if start:
            self.start()

    @property
    def is_running(self) -> bool:
        """Whether the timer runs."""
        return self._is_running

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        print(self.print_tmpl.format(self.since_last_check()))  # noqa: T201 -- the interface of MMEngine
        self._is_running = False

    def start(self) -> None:
        """Start the timer; if it runs already, restart the time since the last check."""
        self._last = time()
        if not self._is_running:
            self._start = self._last
            self._is_running = True

    def since_start(self) -> float:
        """Return the seconds since the start.

        Raises:
            TimerError: if the timer does not run.
        """
        self._check()
        self._last = time()
        return self._last - self._start

    def since_last_check(self) -> float:
        """Return the seconds since the timer was last read or started.

        Raises:
            TimerError: if the timer does not run.
        """
        self._check()
        before, self._last = self._last, time()
        return self._last - before

    def _check(self) -> None:
        if not self._is_running:
            raise TimerError("The timer is not running. Call start() first.")


_timers: dict[str, Timer] = {}


def check_time(timer_id: str) -> float:
    """Return the seconds since the last call with this name, and 0 at the first call."""
    if timer_id in _timers:
        return _timers[timer_id].since_last_check()
    _timers[timer_id] = Timer()
    return 0
