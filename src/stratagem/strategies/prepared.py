"""A descriptor for attributes that are set by ``prepare``."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, final, overload

from stratagem.errors import NotPreparedError

__all__ = ["Prepared"]

T = TypeVar("T")


@final
class Prepared(Generic[T]):
    """An attribute that ``prepare`` sets. Reading it before raises a :class:`NotPreparedError` with a hint."""

    def __init__(self, hint: str) -> None:
        self._hint = hint
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Prepared[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__[self._name]
        except KeyError:
            raise NotPreparedError(f"{owner.__name__} has no {self._name} yet. {self._hint}") from None

    def __set__(self, instance: object, value: T) -> None:
        instance.__dict__[self._name] = value

    def get(self, instance: object) -> T | None:
        """Return the value, or None before it is set."""
        return instance.__dict__.get(self._name)

    def clear(self, instance: object) -> None:
        """Remove the value."""
        instance.__dict__.pop(self._name, None)
