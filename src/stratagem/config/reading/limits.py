"""Refuse data that is deep or large beyond reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from stratagem.errors import ConfigParsingError

__all__ = ["children_of_data", "check_size_limits"]


# Beyond what any configuration needs; what lies above is an attack or a mistake.
MAX_DEPTH = 100
MAX_VALUES = 1_000_000


def check_size_limits(root: Any, children: Callable[[Any], Iterable[Any]], name: str) -> None:
    """Refuse a tree that is too deep or too large when written out, as one of aliases to aliases is.

    Raises:
        ConfigParsingError: if it is.
    """
    pending = [(root, 1)]
    values = 0
    while pending:
        node, depth = pending.pop()
        values += 1
        if depth > MAX_DEPTH:
            raise ConfigParsingError(f"{name} is nested too deeply for a configuration: more than {MAX_DEPTH} levels.")
        if values > MAX_VALUES:
            raise ConfigParsingError(f"{name} stands for more than {MAX_VALUES} values, too many for a configuration.")
        pending.extend((child, depth + 1) for child in children(node))


def children_of_data(value: Any) -> Iterable[Any]:
    """Return the values in a dict or a list; nothing for any other value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
