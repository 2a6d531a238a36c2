"""String classes that record their origin: names from data files, and strings that contain environment variable values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self, final

__all__ = [
    "DataName",
    "InterpolatedDataName",
    "InterpolatedStr",
    "data_keys",
    "holds_data",
    "is_dotted_name",
    "mark_data",
    "template_of",
    "unmark_data",
]

_DOTTED = re.compile(r"\w+(?:[.:]\w+)+")
# The values of these keys are looked up in registries even if they are not dotted names.
_LOOKED_UP = frozenset({"type", "runner_type", "optimizer_type", "strategy", "constructor", "_scope_", "default_scope"})


def is_dotted_name(text: str) -> bool:
    """Return whether ``text`` has the form of a dotted import path, such as ``os.system``."""
    return _DOTTED.fullmatch(text) is not None


class DataName(str):
    """A key from a data file, or a string from a data file that could select an import: a dotted path, a type or a scope.

    It behaves like any other ``str``. Registries check for this class: they do not import the object that such a string
    names unless its package is allowed, and they restrict the arguments whose keys have this class. Merging, copying
    and pickling preserve the class, also in plain dicts, so the restriction also applies to copies of the value.
    """

    __slots__ = ()


@final
class InterpolatedStr(str):
    """A string that contains environment variable values; ``template`` is the same string with the placeholders.

    It behaves like any other ``str``. Saved and displayed configurations contain the template instead.
    """

    __slots__ = ("template",)

    template: str

    def __new__(cls, text: str, template: str) -> Self:
        filled = super().__new__(cls, text)
        filled.template = template
        return filled

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.template


@final
class InterpolatedDataName(DataName):
    """A :class:`DataName` that also has the template of an :class:`InterpolatedStr`."""

    __slots__ = ("template",)

    template: str

    def __new__(cls, text: str, template: str) -> Self:
        filled = super().__new__(cls, text)
        filled.template = template
        return filled

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.template


def template_of(value: object) -> str | None:
    """Return the template of an interpolated string; None for any other value."""
    return value.template if isinstance(value, InterpolatedStr | InterpolatedDataName) else None


def mark_data(value: Any, key: object = None) -> Any:
    """Return a copy of parsed data in which keys and names are ``DataName``; ``key`` is the key of ``value``."""
    if isinstance(value, str):
        return _as_name(value) if key in _LOOKED_UP or is_dotted_name(value) else value
    if isinstance(value, dict):
        return {
            _as_name(inner) if isinstance(inner, str) else inner: mark_data(item, inner)
            for inner, item in value.items()
        }
    if isinstance(value, list):
        return [mark_data(item, key) for item in value]
    return value


def _as_name(text: str) -> DataName:
    template = template_of(text)
    return DataName(text) if template is None else InterpolatedDataName(text, template)


def unmark_data(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples with plain ``str`` objects, for libraries that check the class."""
    if isinstance(value, DataName | InterpolatedStr):
        return str(value)
    if isinstance(value, dict):
        return {unmark_data(key): unmark_data(item) for key, item in value.items()}
    return type(value)(map(unmark_data, value)) if type(value) in (list, tuple) else value


def data_keys(mapping: Mapping[str, Any]) -> set[str]:
    """Return the keys of a mapping that come from a data file."""
    return {key for key in mapping if isinstance(key, DataName)}


def holds_data(value: object) -> bool:
    """Return whether a value or anything nested in it comes from a data file."""
    if isinstance(value, Mapping):
        return any(holds_data(key) or holds_data(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_data, value))
    return isinstance(value, DataName)
