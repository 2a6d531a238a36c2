"""What is due by the time that has passed, on all ranks at once."""

from __future__ import annotations

import time
from typing import final

from stratagem.distributed import AsyncMaxReduce

__all__ = ["DistributedTimer"]


@final
class DistributedTimer:
    """Tells when so much time has passed, on all ranks after the same iteration.

    Args:
        seconds: how long it takes.
        distributed: whether there are other ranks.
    """

    def __init__(self, seconds: float, *, distributed: bool) -> None:
        self._seconds = seconds
        self._async_max = AsyncMaxReduce() if distributed else None
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._begin = time.monotonic()

    def due(self) -> bool:
        """Tell whether the time has passed for some rank. Collective, without a wait: it tells what was so a call ago."""
        passed = time.monotonic() - self._begin >= self._seconds
        if self._async_max is None:
            return passed
        due = self._async_max.wait() > 0
        self._async_max.start(int(passed))
        return due

    def finish(self) -> None:
        """Ask no more. Collective: no exchange may be under way when the ranks part."""
        if self._async_max is not None:
            self._async_max.wait()
