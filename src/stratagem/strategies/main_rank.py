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

    Collective. If it fails, every rank raises: rank 0 the error itself, the others one that quotes it, so that nobody
    waits for a rank that is gone. The others go on only when rank 0 is done.
    """
    outcome: tuple[T | None, str | None, Exception | None] = (None, None, None)
    if is_main_process():
        try:
            outcome = (act(), None, None)
        except Exception as error:  # noqa: BLE001 -- raised again below, after the others were told
            outcome = (None, f"{type(error).__name__}: {error}", error)
    result, message = broadcast_object(outcome[:2])
    if outcome[2] is not None:
        raise outcome[2]
    if message is not None:
        raise StratagemError(f"Rank 0 failed: {message}")
    return result  # type: ignore[return-value]  # where there is no message there is a result
