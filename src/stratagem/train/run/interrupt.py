"""Stop a run on a signal or at the request of a hook, on all ranks after the same iteration."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, final

from stratagem.distributed import AsyncMaxReduce
from stratagem.train.run.signals import signals

__all__ = ["Interrupt"]

_NOTHING: Final = (0, 0, 0)


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
        # Reduces three numbers to their maximum over the ranks: the signal number, whether a hook requests to stop, and the
        # negative of the latter, which yields its minimum.
        self._async_max = AsyncMaxReduce(3) if distributed else None
        # The result of a reduction that this rank waited for because it requested to stop; the next call uses it.
        self._early: tuple[int, ...] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals for the duration of the context. Collective on exit, unless an error was raised."""
        self.received = self._heard = None
        self.passed_on = self.stopping = False
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

    def due(self, stop: bool = False) -> bool:
        """Return whether the ranks have agreed to stop. Collective, but blocks only on ranks with ``stop=True``.

        The ranks agree at the call at which all of them request to stop; otherwise, they agree one call after a rank has
        requested to stop or received a signal.

        Args:
            stop: whether a hook on this rank requests to stop.
        """
        if self.received is not None or self.stopping:
            return True
        if self._async_max is None:
            self.received, self.stopping = signals.first, stop
        elif not self._read_pending():
            self._start(self._async_max, stop=stop)
            if stop:
                self._stop_if_unanimous(self._async_max.wait_all())
        return self.received is not None or self.stopping

    def due_now(self, stop: bool = False) -> bool:
        """Return whether any rank has received a signal so far. Collective; waits for the slowest rank.

        Args:
            stop: whether a hook on this rank requests to stop; if any does, :attr:`stopping` is set on all ranks.
        """
        if self.received is None and not self.stopping:
            if self._async_max is None:
                self.received, self.stopping = signals.first, stop
            elif not self._read_pending():
                self._start(self._async_max, stop=stop)
                self._read_pending()
        return self.received is not None

    def settle(self) -> None:
        """Read the result of the last :meth:`due`, without starting a new reduction. Every rank must have called it."""
        if self.received is None and not self.stopping:
            self._read_pending()

    def _start(self, async_max: AsyncMaxReduce, *, stop: bool) -> None:
        async_max.start(signals.first or 0, int(stop), -int(stop))

    def _stop_if_unanimous(self, numbers: tuple[int, ...]) -> None:
        """Stop if all ranks requested it, since all of them read the result now; otherwise keep the result for the next call."""
        if numbers[2] < 0:
            self._apply(numbers)
        else:
            self._early = numbers

    def _read_pending(self) -> bool:
        """Apply the result of the reduction in progress; return whether it contains a signal or a request."""
        numbers = self._pop_pending()
        self._apply(numbers)
        return any(numbers[:2])

    def _pop_pending(self) -> tuple[int, ...]:
        """Return the result of the reduction in progress, or zeros."""
        numbers, self._early = self._early, None
        if numbers is None and self._async_max is not None:
            numbers = self._async_max.wait_all()
        return numbers or _NOTHING

    def _apply(self, numbers: tuple[int, ...]) -> None:
        signal_number, any_stop, _ = numbers
        self.received, self.stopping = signal_number or None, any_stop > 0

    def _heard_by_now(self) -> int | None:
        """Return the largest signal number that any rank has received; None if there is none. Collective."""
        if self._async_max is None:
            return signals.first
        earlier = self._pop_pending()[0]
        if earlier:
            return earlier
        self._start(self._async_max, stop=False)
        return self._async_max.wait() or None
