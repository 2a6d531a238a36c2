"""Do something on rank 0, and have every rank know how it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stratagem.dist import Team

__all__ = ["from_main"]

T = TypeVar("T")


def from_main(act: Callable[[], T]) -> T:
    """Call ``act`` on rank 0 and return its result on every rank, once it is done; if it fails, every rank raises.

    Collective.
    """
    return Team.of().first(act)
