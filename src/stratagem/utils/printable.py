"""Escape characters that would act on a terminal, or forge lines, in text that contains names from files."""

from __future__ import annotations

import re

__all__ = ["escape_controls", "printable_name"]

# Control characters except the tab and the line feed, surrogates, line separators, and characters that are invisible or change
# the direction of the text.
_CONTROLS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e007f]"
)


def escape_controls(text: str) -> str:
    r"""Return text that can be printed or logged as it is: ``\x1b`` instead of an escape character.

    Tabs and line feeds are kept, because messages consist of lines. Use :func:`printable_name` for a name in a line.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_name(name: object) -> str:
    """Return a name from a file in one line, with control characters, tabs and line feeds escaped."""
    text = escape_controls(str(name))
    return text.replace("\n", "\\n").replace("\t", "\\t")
