"""What a pickle says, written down and not done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

__all__ = ["PickledGlobal", "PersistentId", "PickledObject"]


@final
@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """A class or function that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@final
@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to something that is stored outside of the pickle, such as a tensor's memory."""

    identity: Any


@final
@dataclass(slots=True, eq=False, repr=False)
class PickledObject:
    """An object that a pickle would have made: what it would have called, with what, and what it would have put in.

    It is inert: nothing of it is called or imported, whoever looks at it.
    """

    maker: Any
    args: Any = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it would have been made by, as ``module.name``."""
        return str(self.maker) if isinstance(self.maker, PickledGlobal) else "a function that it made itself"
