"""Which arguments a class or function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Arguments", "arguments_of"]


@final
@dataclass(frozen=True, slots=True)
class Arguments:
    """The names that a target takes as keywords. ``open`` means that it takes any other name as well."""

    names: tuple[str, ...]
    required: frozenset[str]
    open: bool

    def accept(self, name: str) -> bool:
        """Tell whether the target takes an argument of this name."""
        return self.open or name in self.names


def arguments_of(target: Callable[..., Any]) -> Arguments:
    """Return what ``target`` takes; a target without a readable signature takes everything."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return Arguments((), frozenset(), open=True)
    keywords = [item for item in parameters if item.kind in {item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY}]
    return Arguments(
        tuple(item.name for item in keywords),
        frozenset(item.name for item in keywords if item.default is item.empty),
        any(item.kind is item.VAR_KEYWORD for item in parameters),
    )
