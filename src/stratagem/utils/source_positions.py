"""Mappings that know where in a configuration they were written, so that errors can say it."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["HasSourcePosition", "source_position"]


class HasSourcePosition(ABC):
    """A mapping that can say where it, or the value of one of its keys, was given."""

    __slots__ = ()

    @abstractmethod
    def __source_position__(self, key: str | None = None) -> str:
        """Return a text such as ``"model.backbone (configs/resnet.py:12)"``, or ``""`` where that is not known."""


def source_position(value: object, key: str | None = None) -> str:
    """Return where ``value``, or the value of its ``key``, was given; ``""`` where that is not known."""
    return value.__source_position__(key) if isinstance(value, HasSourcePosition) else ""
