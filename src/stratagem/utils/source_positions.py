"""Positions of values in configuration files, for error messages."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["HasSourcePosition", "source_position"]


class HasSourcePosition(ABC):
    """A mapping that records the positions at which it and its values were set."""

    __slots__ = ()

    @abstractmethod
    def __source_position__(self, key: str | None = None) -> str:
        """Return a position such as ``"model.backbone (configs/resnet.py:12)"``, or ``""`` if it is unknown."""


def source_position(value: object, key: str | None = None) -> str:
    """Return the position of ``value``, or of the value of its ``key``; ``""`` if it is unknown."""
    return value.__source_position__(key) if isinstance(value, HasSourcePosition) else ""
