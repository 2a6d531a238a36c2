"""Stop a run on a signal or at the request of a hook, on all ranks after the same iteration."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from stratagem.distributed import AsyncMaxReduce, StopAgreement
from stratagem.train.run.signals import signals

__all__ = ["Interrupt"]


@final
class Interrupt:
    """Detects requests to stop this run on any rank: the signals SIGINT, SIGTERM or SIGUSR1, and requests by hooks.

    Attributes:
        received: the number of the signal that stopped the run, equal on all ranks; None if no signal stopped it.
        stopping: whether the ranks have agreed to stop at the request of a hook, equal on all ranks.
        active: whether training is in progress and can be interrupted.
        passed_on: whether :meth:`raise_heard` has raised an exception.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.received: int | None = None
        self.stopping = False
        self.active = False
        self.passed_on = False
        self._heard: int | None = None
        self._distributed = distributed
        self._agreement: StopAgreement | None = None
        # Reduces the signal number and whether a hook requests to stop to their maximum over the ranks.
        self._max = AsyncMaxReduce(2) if distributed else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals for the duration of the context. Collective on exit, unless an error was raised."""
        self.received = self._heard = None
        self.passed_on = self.stopping = False
        self.active = True
        self._agreement = StopAgreement() if self._distributed else None
        try:
            with signals.listening():
                yield
                # Do not set `received`: a signal after the last iteration does not stop the run.
                self._heard = self.received or self._max_over_ranks(stop=False)[0] or None
        finally:
            self.active = False
            if self._agreement is not None:
                self._agreement.close()
                self._agreement = None

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

    def due(self, stop: bool = False) -> bool:
        """Return whether all ranks stop here. Every rank must call it at the same points; it blocks only after a request.

        If all ranks request to stop at the same call, they stop there. Otherwise, they stop at the first call that no rank has
        passed when all ranks know of the request; see :class:`~stratagem.distributed.StopAgreement`.

        Args:
            stop: whether a hook on this rank requests to stop.
        """
        if self.received is not None or self.stopping:
            return True
        if self._agreement is None:
            self.received, self.stopping = signals.first, stop
        else:
            request = self._agreement.check(signals.first or 0, stop)
            if request is None:
                return False
            self.received, self.stopping = request.signal or None, request.stop
        return self.received is not None or self.stopping

    def due_now(self, stop: bool = False) -> bool:
        """Return whether any rank has received a signal so far. Collective; waits for the slowest rank.

        Args:
            stop: whether a hook on this rank requests to stop; if any does, :attr:`stopping` is set on all ranks.
        """
        if self.received is None and not self.stopping:
            number, any_stop = self._max_over_ranks(stop=stop)
            self.received, self.stopping = number or None, any_stop > 0
        return self.received is not None

    def _max_over_ranks(self, *, stop: bool) -> tuple[int, int]:
        """Return the largest signal number and whether a hook requests to stop, on any rank. Collective."""
        if self._max is None:
            return signals.first or 0, int(stop)
        self._max.start(signals.first or 0, int(stop))
        number, any_stop = self._max.wait_all()
        return number, any_stop
