"""Stop between two iterations, all ranks after the same one, when the user or the scheduler asks for it."""

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
    """Whether a signal asks this run to stop: SIGINT, SIGTERM or SIGUSR1 to any of its ranks.

    Attributes:
        received: the number of the signal that stopped the run, equal on all ranks; None if none did.
        active: whether a training is listening, so that there is something to ask.
        passed_on: whether :meth:`raise_heard` has raised.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.received: int | None = None
        self.active = False
        self.passed_on = False
        self._heard: int | None = None
        self._async_max = AsyncMaxReduce() if distributed else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals while the context lasts. Collective where it ends without an error."""
        self.received = self._heard = None
        self.passed_on = False
        self.active = True
        try:
            with signals.listening():
                yield
                # Not in `received`: a signal after the last iteration no longer stops the run.
                self._heard = self.received or self._heard_by_now()
        finally:
            self.active = False

    def raise_heard(self) -> None:
        """Pass the signal on to the program around the run, the same one on all ranks.

        Call it after :meth:`listening` has ended. A signal that came after the last iteration counts as well.

        Raises:
            KeyboardInterrupt: if SIGINT was heard.
            SystemExit: with 128 plus its number, if another signal was heard.
        """
        if self._heard is None:
            return
        self.passed_on = True
        if self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._heard)

    def due(self) -> bool:
        """Tell whether to stop here. Collective, without a wait: it tells what the ranks knew when it was last called."""
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
        """Tell the same with all that the ranks know now. Collective; every rank waits for the slowest."""
        self.received = self.received or self._heard_by_now()
        return self.received is not None

    def _heard_by_now(self) -> int | None:
        """Return the greatest number that a rank has heard; None if none has. Collective."""
        if self._async_max is None:
            return signals.first
        earlier = self._async_max.wait()
        if earlier:
            return earlier
        self._async_max.start(signals.first or 0)
        return self._async_max.wait() or None
