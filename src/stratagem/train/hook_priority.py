"""Priorities of hooks."""

from __future__ import annotations

from enum import IntEnum
from typing import final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["Priority", "get_priority"]


@final
class Priority(IntEnum):
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
    """Return a priority as an integer from 0 to 100. Names are case-insensitive.

    Raises:
        ConfigValueError: if the number is out of range or the name is unknown.
        ConfigTypeError: if ``priority`` is neither an integer nor a name.
    """
    if isinstance(priority, bool) or not isinstance(priority, int | str):
        raise ConfigTypeError(
            f"Expected the priority of a hook to be an integer from 0 to 100 or a name, got {priority!r}."
        )
    if isinstance(priority, int):
        if not 0 <= priority <= 100:
            raise ConfigValueError(f"Expected the priority of a hook to be from 0 to 100, got {int(priority)}.")
        return int(priority)
    try:
        return int(Priority[priority.upper()])
    except KeyError:
        names = [name.name for name in Priority]
        raise ConfigValueError(f"Unknown priority {priority!r}. {did_you_mean(priority, names)}") from None
