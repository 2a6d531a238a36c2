"""Do something on rank 0, and have every rank know how it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stratagem.dist import broadcast_object, is_main_process
from stratagem.errors import StratagemError

__all__ = ["from_main"]

T = TypeVar("T")


def from_main(act: Callable[[], T]) -> T:
    """Call ``act`` on rank 0 and return its result on every rank.

    Collective. If it fails, every rank raises: rank 0 the error itself, the others one of its kind that quotes it, so
    that nobody waits for a rank that is gone, and whoever handles the error handles it everywhere. The others go on
    only when rank 0 is done.
    """
    result: T | None = None
    failure: Exception | None = None
    if is_main_process():
        try:
            result = act()
        except Exception as error:  # noqa: BLE001 -- raised again below, after the others were told
            failure = error
    told = None if failure is None else (_kind_of(failure), f"Rank 0 failed: {type(failure).__name__}: {failure}")
    result, told = broadcast_object((result, told))
    if failure is not None:
        raise failure
    if told is not None:
        kind, message = told
        raise kind(message)
    return result  # type: ignore[return-value]  # where nothing failed there is a result


def _kind_of(error: Exception) -> type[StratagemError]:
    """Return the nearest class of ours, which every rank has and which takes a message alone."""
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == StratagemError.__module__)
    return next(ours, StratagemError)
