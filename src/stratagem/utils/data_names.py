"""Strings that remember where they came from: names from data files, and text from the environment."""

from __future__ import annotations

import re
from typing import Any, Self, final

__all__ = ["DataName", "FilledDataName", "FilledText", "is_dotted_name", "template_of"]

_DOTTED = re.compile(r"\w+(?:[.:]\w+)+")


def is_dotted_name(text: str) -> bool:
    """Tell whether ``text`` could be the dotted path of something importable, such as ``os.system``."""
    return _DOTTED.fullmatch(text) is not None


class DataName(str):
    """A text from a data file that could choose what is imported: a dotted path, or the name of a scope.

    It is a ``str`` in every respect. Registries look at its class and do not import what it names, unless the program
    allowed its package. The class survives merging, copying and pickling, so the rule travels with the value.
    """

    __slots__ = ()


@final
class FilledText(str):
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
class FilledDataName(DataName):
    """A :class:`DataName` that is a :class:`FilledText` as well."""

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
    return value.template if isinstance(value, FilledText | FilledDataName) else None
