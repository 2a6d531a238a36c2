"""A timer that expires on all ranks after the same iteration."""

from __future__ import annotations

import time
from typing import final

from stratagem.distributed import AsyncMaxReduce

__all__ = ["DistributedTimer"]


@final
class DistributedTimer:
    """A timer that expires on all ranks after the same iteration.

    Args:
        seconds: the duration.
        distributed: whether the run has several ranks.
    """

    def __init__(self, seconds: float, *, distributed: bool) -> None:
        self._seconds = seconds
        self._async_max = AsyncMaxReduce() if distributed else None
        self.restart()

    def restart(self) -> None:
        """Restart the timer."""
        self._begin = time.monotonic()

    def due(self) -> bool:
        """Return whether the timer had expired on any rank at the previous call. Collective, but does not block."""
        passed = time.monotonic() - self._begin >= self._seconds
        if self._async_max is None:
            return passed
        due = self._async_max.wait() > 0
        self._async_max.start(int(passed))
        return due

    def finish(self) -> None:
        """Complete the pending reduction, so that none is in progress when the ranks diverge. Collective."""
        if self._async_max is not None:
            self._async_max.wait()
