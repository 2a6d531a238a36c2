"""Stop a run on a signal, on all ranks after the same iteration."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from stratagem.distributed import AsyncMaxReduce
from stratagem.train.run.signals import signals

__all__ = ["Interrupt"]


@final
class Interrupt:
    """Detects signals to any rank that request this run to stop: SIGINT, SIGTERM or SIGUSR1.

    Attributes:
        received: the number of the signal that stopped the run, equal on all ranks; None if no signal did.
        active: whether training is in progress and can be interrupted.
        passed_on: whether :meth:`raise_heard` has raised an exception.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.received: int | None = None
        self.active = False
        self.passed_on = False
        self._heard: int | None = None
        self._async_max = AsyncMaxReduce() if distributed else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals for the duration of the context. Collective on exit, unless an error was raised."""
        self.received = self._heard = None
        self.passed_on = False
        self.active = True
        try:
            with signals.listening():
                yield
                # Do not set `received`: a signal after the last iteration does not stop the run.
                self._heard = self.received or self._heard_by_now()
        finally:
            self.active = False

    def raise_heard(self) -> None:
        """Raise the exception for the received signal, the same one on all ranks.

        Call it after :meth:`listening` has exited. Signals after the last iteration are included.

        Raises:
            KeyboardInterrupt: if SIGINT was received.
            SystemExit: with code 128 plus the signal number, if another signal was received.
        """
        if self._heard is None:
            return
        self.passed_on = True
        if self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._heard)

    def due(self) -> bool:
        """Return whether any rank had received a signal at the previous call. Collective, but does not block."""
        if self.received is not None:
            return True
        if self._async_max is None:
            self.received = signals.first
        else:
            self.received = self._async_max.wait() or None
            if self.received is None:
                self._async_max.start(signals.first or 0)
        return self.received is not None

    def due_now(self) -> bool:
        """Return whether any rank has received a signal so far. Collective; waits for the slowest rank."""
        self.received = self.received or self._heard_by_now()
        return self.received is not None

    def _heard_by_now(self) -> int | None:
        """Return the largest signal number that any rank has received; None if there is none. Collective."""
        if self._async_max is None:
            return signals.first
        earlier = self._async_max.wait()
        if earlier:
            return earlier
        self._async_max.start(signals.first or 0)
        return self._async_max.wait() or None
