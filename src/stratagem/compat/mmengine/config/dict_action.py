"""The ``argparse`` action for options such as ``--cfg-options model.depth=3 lr=0.1``."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["DictAction"]

_BRACKETS = {"(": ")", "[": "]"}


class DictAction(Action):
    """Collect ``key=value`` arguments in a dict.

    Values are integers, floats, ``true`` and ``false``, ``None``, or else strings. ``a,b`` and ``[a,b]`` are lists and ``(a,b)``
    is a tuple; they can be nested. Several uses of the option are merged.
    """

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for argument in values or ():
            key, separator, text = argument.partition("=")
            if not separator:
                parser.error(f"{option_string or self.dest}: expected key=value, got {argument!r}.")
            options[key] = self._parse_iterable(text)
        setattr(namespace, self.dest, options)

    @staticmethod
    def _parse_int_float_bool(val: str) -> Any:
        """Return the number, bool or None that a string denotes, or the string itself."""
        for kind in (int, float):
            try:
                return kind(val)
            except ValueError:
                continue
        return {"true": True, "false": False}.get(val.lower(), None if val == "None" else val)

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """Return the list, tuple or scalar that a string denotes.

        Raises:
            AssertionError: if brackets are not balanced.
        """
        return _parse(val.strip("'\"").replace(" ", ""))


def _parse(text: str) -> Any:
    text = text.strip("'\"")
    bracket = text[:1] if text[-1:] and _BRACKETS.get(text[:1]) == text[-1:] else ""
    if not bracket and "," not in text:
        return DictAction._parse_int_float_bool(text)
    items = [_parse(item) for item in _split(text[1:-1] if bracket else text)]
    return tuple(items) if bracket == "(" else items


def _split(text: str) -> Iterator[str]:
    """Yield the parts of a string between the commas that are not in brackets."""
    if any(text.count(opening) != text.count(closing) for opening, closing in _BRACKETS.items()):
        raise AssertionError(f"Brackets are not balanced in {text!r}.")
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character in _BRACKETS) - (character in _BRACKETS.values())
        if character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if start < len(text):
        yield text[start:]
