"""Limits on the depth and size of data files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from stratagem.errors import ConfigParsingError

__all__ = ["children_of_data", "check_size_limits"]


# More than any configuration needs; larger data is an attack or a mistake.
MAX_DEPTH = 100
MAX_VALUES = 1_000_000


def check_size_limits(root: Any, children: Callable[[Any], Iterable[Any]], name: str) -> None:
    """Raise an error if a tree is too deep or too large. Each use of a YAML alias counts.

    Raises:
        ConfigParsingError: if the tree exceeds a limit.
    """
    pending = [(root, 1)]
    values = 0
    while pending:
        node, depth = pending.pop()
        values += 1
        if depth > MAX_DEPTH:
            raise ConfigParsingError(f"{name} is nested too deeply: more than {MAX_DEPTH} levels.")
        if values > MAX_VALUES:
            raise ConfigParsingError(f"{name} has more than {MAX_VALUES} values, including repeated aliases.")
        pending.extend((child, depth + 1) for child in children(node))


def children_of_data(value: Any) -> Iterable[Any]:
    """Return the values of a dict or a list; an empty iterable for any other value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
