"""Stop between two iterations, all ranks after the same one, when the user or the scheduler asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from stratagem.dist import Agreement
from stratagem.train.signals import signals

__all__ = ["Interrupt"]


@final
class Interrupt:
    """Whether a signal asks this run to stop: SIGINT, SIGTERM or SIGUSR1 to any of its ranks.

    Attributes:
        received: the signal's number, as the ranks agreed, so it is equal on all of them; None where there was none.
        active: whether a training listens, so that there is something to ask.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.received: int | None = None
        self.active = False
        self._agreement = Agreement() if distributed else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals while the context lasts. Collective where it ends without an error."""
        self.received = None
        self.active = True
        try:
            with signals.listening():
                yield
                if self._agreement is not None:
                    # No exchange may be under way when the group ends.
                    self._agreement.answer()
        finally:
            self.active = False

    def due(self) -> bool:
        """Tell whether to stop here. Collective, without a wait: it tells what the ranks knew when it was last called."""
        if self.received is not None:
            return True
        if self._agreement is None:
            self.received = signals.first
        else:
            self.received = self._agreement.answer() or None
            if self.received is None:
                self._agreement.ask(signals.first or 0)
        return self.received is not None

    def due_now(self) -> bool:
        """Tell the same with all that the ranks know now. Collective; every rank waits for the slowest."""
        if not self.due() and self._agreement is not None:
            self.received = self._agreement.answer() or None
        return self.received is not None
