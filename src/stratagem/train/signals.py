"""Stop between two iterations when the user or the scheduler asks for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import torch

from stratagem.dist import all_reduce

__all__ = ["Interrupt"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on the signal that the terminal has sent already; that is no second request.
_SAME_REQUEST_S = 1.0
# How often ranks ask each other, in iterations: one small all-reduce.
_AGREE_EVERY = 10


@final
class Interrupt:
    """Remembers that SIGINT or SIGTERM came; a second one, later, stops at once.

    With several ranks they agree every ten iterations, so that all stop after the same one.

    Attributes:
        received: the signal that :meth:`due` told of, equal on every rank; None where there was none.
    """

    def __init__(self, *, distributed: bool) -> None:
        self.received: int | None = None
        self._distributed = distributed
        # What came to this process alone: collectives must not hang on it.
        self._here: int | None = None
        self._since = 0.0

    def due(self, iteration: int) -> bool:
        """Tell whether to stop after ``iteration`` iterations. Collective where there are several ranks."""
        if not self._distributed:
            self.received = self._here
            return self.received is not None
        if iteration % _AGREE_EVERY:
            return self.received is not None
        signals = torch.tensor([self._here or 0])
        all_reduce(signals, "max")
        self.received = int(signals.item()) or None
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the context lasts; the handlers that were there come back after it."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread alone.
            yield
            return
        self.received = self._here = None
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._here is None:
            self._here, self._since = number, now
        elif now - self._since > _SAME_REQUEST_S:
            raise KeyboardInterrupt
