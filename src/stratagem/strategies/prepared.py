"""Attributes that exist once a strategy is prepared."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, final, overload

from stratagem.errors import NotPreparedError

__all__ = ["Prepared"]

T = TypeVar("T")


@final
class Prepared(Generic[T]):
    """An attribute that ``prepare`` sets; reading it earlier is a :class:`NotPreparedError` that says what to do."""

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
        """Go back to not having been set."""
        instance.__dict__.pop(self._name, None)
