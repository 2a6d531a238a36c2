"""Poll the store of a process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

__all__ = ["poll_interval", "poll_until"]

# With more ranks, each rank polls less often, because the store serves about 10,000 requests per second.
_RANKS_AT_FULL_RATE: Final = 256
_FIRST_PAUSE_S: Final = 0.001


def poll_interval(seconds: float, ranks: int) -> float:
    """Return the interval in seconds at which each rank polls: ``seconds``, or longer with more than 256 ranks."""
    return seconds * max(1.0, ranks / _RANKS_AT_FULL_RATE)


def poll_until(condition: Callable[[], bool], seconds: float, *, longest_pause_s: float) -> bool:
    """Check a condition with growing pauses until it is met or the time has passed; return whether it is met."""
    end, pause = time.monotonic() + seconds, _FIRST_PAUSE_S
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest_pause_s)
    return True
