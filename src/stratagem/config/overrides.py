"""Parse ``key=value`` overrides from the command line. Values are parsed, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, final

from stratagem.errors import ConfigParsingError
from stratagem.utils.secrets.names import is_secret_name
from stratagem.utils.secrets.values import remember_secret

__all__ = ["parse_overrides", "parse_scalar", "parse_value"]

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?((\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf|nan)")
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Return ``{"a.b": 1, "c.0.d": "x"}`` for ``["a.b=1", "c.0.d=x"]``. The last value of a repeated key is used.

    A value is an int, a float, ``true``/``false``, ``none``, a list ``[1,2]`` or ``1,2``, a tuple ``(1,2)``, a dict
    ``{a: 1}``, or otherwise a string. Quoted values are always strings: ``name='1'``.

    Raises:
        ConfigParsingError: if the ``=`` or the key is missing, or a bracket or quote is not closed.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigParsingError(f"{pair!r} is not an override. Write key=value, such as model.depth=50.")
        if is_secret_name(key.strip()):
            remember_secret(text.strip().strip("'\""))
        overrides[key.strip()] = parse_value(text)
    return overrides


def parse_value(text: str) -> Any:
    """Return the value that ``text`` represents; see :func:`parse_overrides`.

    Raises:
        ConfigParsingError: if a bracket or quote is not closed.
    """
    reader = _Reader(text)
    try:
        items = reader.items(closing="")
    except RecursionError as error:
        raise ConfigParsingError(f"{text[:40]!r}... is nested too deeply.") from error
    return items[0] if len(items) == 1 and not text.rstrip().endswith(",") else items or ""


@final
class _Reader:
    """A recursive descent parser for one value."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def items(self, closing: str) -> list[Any]:
        """Parse comma-separated values up to and including ``closing``, or up to the end if it is empty."""
        items: list[Any] = []
        while not self._ends(closing):
            items.append(self._value(stops="," + closing))
            self._comma(closing)
        return items

    def _pairs(self) -> dict[Any, Any]:
        pairs: dict[Any, Any] = {}
        while not self._ends("}"):
            key = self._value(stops=":}")
            if self._peek() != ":":
                raise self._error("A dict must be written as {key: value}")
            self._at += 1
            pairs[key] = self._value(stops=",}")
            self._comma("}")
        return pairs

    def _value(self, stops: str) -> Any:
        first = self._peek()
        if first in _CLOSING:
            self._at += 1
            if first == "{":
                return self._pairs()
            items = self.items(_CLOSING[first])
            return tuple(items) if first == "(" else items
        if first in {"'", '"'}:
            return self._quoted(first)
        start = self._at
        while self._at < len(self._text) and self._text[self._at] not in stops:
            self._at += 1
        return parse_scalar(self._text[start : self._at].strip())

    def _quoted(self, quote: str) -> str:
        end = self._text.find(quote, self._at + 1)
        if end < 0:
            raise self._error(f"The quote {quote} is not closed")
        text = self._text[self._at + 1 : end]
        self._at = end + 1
        return text

    def _comma(self, closing: str) -> None:
        following = self._peek()
        if following == ",":
            self._at += 1
        elif following != closing:
            raise self._error(f"Expected ',' or {closing!r}" if closing else "Unexpected text after the value")

    def _ends(self, closing: str) -> bool:
        if self._peek() != closing:
            if closing and not self._peek():
                raise self._error(f"{closing!r} is missing")
            return False
        self._at += len(closing)
        return True

    def _peek(self) -> str:
        """Skip whitespace and return the next character, or ``""`` at the end."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at] if self._at < len(self._text) else ""

    def _error(self, problem: str) -> ConfigParsingError:
        return ConfigParsingError(f"{problem} in the value {self._text!r}, at character {self._at + 1}.")


def parse_scalar(word: str) -> Any:
    """Return the int, float, bool or None that a word represents, or the word itself."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else word
