"""Strings that remember where they came from: names from data files, and text from the environment."""

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
# The values of these keys are looked up in registries, even if they are single words.
_LOOKED_UP = frozenset({"type", "runner_type", "optimizer_type", "strategy", "constructor", "_scope_", "default_scope"})


def is_dotted_name(text: str) -> bool:
    """Return whether ``text`` could be the dotted path of something importable, such as ``os.system``."""
    return _DOTTED.fullmatch(text) is not None


class DataName(str):
    """A key of a data file, or a text in one that could choose what is imported: a dotted path, a type or a scope.

    It is a ``str`` in every respect. Registries check its class: they import nothing that it names, unless the program
    allowed its package, and restrict the arguments whose keys are of this class. The class survives merging, copying
    and pickling, also of plain dicts, so the rule stays with the value.
    """

    __slots__ = ()


@final
class InterpolatedStr(str):
    """A string into which placeholders put values of the environment; ``template`` is the string with the placeholders.

    It is a ``str`` in every respect. What is kept of a configuration shows the template.
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
    """A :class:`DataName` that is an :class:`InterpolatedStr` as well."""

    __slots__ = ("template",)

    template: str

    def __new__(cls, text: str, template: str) -> Self:
        filled = super().__new__(cls, text)
        filled.template = template
        return filled

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.template


def template_of(value: object) -> str | None:
    """Return the template of a string that placeholders filled; None for any other value."""
    return value.template if isinstance(value, InterpolatedStr | InterpolatedDataName) else None


def mark_data(value: Any, key: object = None) -> Any:
    """Return a copy of parsed data with its keys and names as ``DataName``; ``key`` is the key of ``value``."""
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
    """Return a copy of nested dicts, lists and tuples with plain strings, for a library that may look at classes."""
    if isinstance(value, DataName | InterpolatedStr):
        return str(value)
    if isinstance(value, dict):
        return {unmark_data(key): unmark_data(item) for key, item in value.items()}
    return type(value)(map(unmark_data, value)) if type(value) in (list, tuple) else value


def data_keys(mapping: Mapping[str, Any]) -> set[str]:
    """Return the keys of a mapping that a data file gave."""
    return {key for key in mapping if isinstance(key, DataName)}


def holds_data(value: object) -> bool:
    """Return whether a value, or anything nested in it, came from a data file."""
    if isinstance(value, Mapping):
        return any(holds_data(key) or holds_data(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_data, value))
    return isinstance(value, DataName)
