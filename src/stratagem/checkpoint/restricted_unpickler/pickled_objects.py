"""Placeholders for the objects in a pickle. The objects themselves are never created."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

__all__ = ["PickledGlobal", "PersistentId", "PickledObject"]


@final
@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """The name of a class or function in a pickle. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@final
@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to data outside the pickle, such as the storage of a tensor."""

    identity: Any


@final
@dataclass(slots=True, eq=False, repr=False)
class PickledObject:
    """An object in a pickle: the call that would create it, and its state, items and key-value pairs.

    The constructor is never called or imported.
    """

    constructor: Any
    args: Any = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def qualified_name(self) -> str:
        """The qualified name of its constructor, ``module.name``."""
        return (
            str(self.constructor)
            if isinstance(self.constructor, PickledGlobal)
            else "a function created by the pickle itself"
        )
