"""Objects that a pure-Python configuration imports only when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Never

from stratagem.errors import ConfigParsingError
from stratagem.utils.lazy import LazyObject as EngineLazyObject

__all__ = ["LazyAttr", "LazyObject", "from_engine", "to_engine"]


class LazyObject:
    """A module, or a name in it, that :meth:`build` imports.

    Args:
        module: the module to import, or several modules with a common package, which :meth:`build` returns.
        imported: the name in the module; None for the module itself.
        location: the file and line of the import statement, for errors.

    Raises:
        TypeError: if an argument has another type.
    """

    def __init__(self, module: str | Sequence[str], imported: str | None = None, location: str | None = None) -> None:
        if not isinstance(module, str) and not (
            isinstance(module, list | tuple) and all(isinstance(each, str) for each in module)
        ):
            raise TypeError(f"module must be a string or a sequence of strings, got {module!r}.")
        if imported is not None and not isinstance(imported, str):
            raise TypeError(f"imported must be a string or None, got {imported!r}.")
        self._module = module
        self._imported = imported
        self.location = location

    @property
    def module(self) -> str:
        """The name of the module that :meth:`build` imports."""
        return self._module if isinstance(self._module, str) else self._module[0].partition(".")[0]

    def build(self) -> Any:
        """Import and return the object.

        Raises:
            ImportError: if the module cannot be imported or does not have the name.
        """
        for name in [self._module] if isinstance(self._module, str) else self._module:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise type(error)(f"Failed to import {name}{_at(self.location)}: {error}") from error
        module = importlib.import_module(self.module)
        if self._imported is None:
            return module
        try:
            return getattr(module, self._imported)
        except AttributeError as error:
            raise ImportError(_missing(self.module, self._imported, self.location)) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyObject | LazyAttr) and to_engine(self) == to_engine(other)

    def __hash__(self) -> int:
        return hash(to_engine(self))

    def __call__(self, *args: object, **kwargs: object) -> Never:
        _refuse_call(f"{self.module}.{self}")

    def __getattr__(self, name: str) -> LazyAttr:
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyAttr(name, self, self.location)

    def __deepcopy__(self, memo: object) -> LazyObject:
        return LazyObject(self._module, self._imported, self.location)

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyObject, (self._module, self._imported, self.location)

    def __str__(self) -> str:
        return self._imported or self.module

    __repr__ = __str__


class LazyAttr:
    """An attribute of a lazy object.

    Args:
        name: the name of the attribute.
        source: the object that has it.
        location: the file and line of the import statement, for errors.
    """

    def __init__(self, name: str, source: LazyObject | LazyAttr, location: str | None = None) -> None:
        self.name = name
        self.source = source
        self.location = location
        is_module = isinstance(source, LazyObject) and source._imported is None
        self._module = source.module if is_module else f"{source.module}.{source}"

    @property
    def module(self) -> str:
        """The dotted name of the object that has the attribute."""
        return self._module

    def build(self) -> Any:
        """Import the object and return its attribute.

        Raises:
            ImportError: if the object cannot be imported or does not have the attribute.
        """
        try:
            return getattr(self.source.build(), self.name)
        except AttributeError as error:
            raise ImportError(_missing(self.module, self.name, self.location)) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyObject | LazyAttr) and to_engine(self) == to_engine(other)

    def __hash__(self) -> int:
        return hash(to_engine(self))

    def __call__(self, *args: object, **kwargs: object) -> Never:
        _refuse_call(f"{self.module}.{self}")

    def __getattr__(self, name: str) -> LazyAttr:
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyAttr(name, self, self.location)

    def __deepcopy__(self, memo: object) -> LazyAttr:
        return LazyAttr(self.name, self.source, self.location)

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyAttr, (self.name, self.source, self.location)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


def _at(location: str | None) -> str:
    return f" ({location})" if location else ""


def _missing(module: str, name: str, location: str | None) -> str:
    return f"Failed to import {module}.{name}{_at(location)}: {module} has no attribute {name!r}."


def _refuse_call(name: str) -> Never:
    raise ConfigParsingError(
        f"{name} was called, but a pure-Python configuration does not execute its imports. Write dict(type={name}, ...)."
    )


def from_engine(lazy: EngineLazyObject) -> LazyObject | LazyAttr:
    """Return a lazy object of the engine with the interface of this module."""
    module, path, position = lazy.__reduce__()[1]
    names = path.split(".") if path else []
    found: LazyObject | LazyAttr = LazyObject(module, names[0] if names else None, position or None)
    for name in names[1:]:
        found = LazyAttr(name, found, position or None)
    return found


def to_engine(lazy: LazyObject | LazyAttr) -> EngineLazyObject:
    """Return a lazy object with the class that the engine resolves."""
    if isinstance(lazy, LazyObject):
        return EngineLazyObject(lazy.module, lazy._imported or "", lazy.location or "")
    module, path, position = to_engine(lazy.source).__reduce__()[1]
    return EngineLazyObject(module, f"{path}.{lazy.name}" if path else lazy.name, position)
