"""Priorities of hooks."""

from __future__ import annotations

from enum import Enum

__all__ = ["Priority", "get_priority"]


class Priority(Enum):
    """Named priorities; hooks with a lower value are called first."""

    HIGHEST = 0
    VERY_HIGH = 10
    HIGH = 30
    ABOVE_NORMAL = 40
    NORMAL = 50
    BELOW_NORMAL = 60
    LOW = 70
    VERY_LOW = 90
    LOWEST = 100


def get_priority(priority: int | str | Priority) -> int:
    """Return a priority as an integer from 0 to 100; names are case-insensitive.

    Raises:
        ValueError: if the number is out of range.
        KeyError: if the name is unknown.
        TypeError: if ``priority`` is something else.
    """
    if isinstance(priority, Priority):
        return int(priority.value)
    if isinstance(priority, str):
        return int(Priority[priority.upper()].value)
    if not isinstance(priority, int):
        raise TypeError(f"priority must be an integer, a name or a Priority, got {priority!r}.")
    if not 0 <= priority <= 100:
        raise ValueError(f"priority must be between 0 and 100, got {priority}.")
    return priority
