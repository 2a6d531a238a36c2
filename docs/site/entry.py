"""A page of the reference, and what it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Entry", "Page"]


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A name that a page describes: of an object, a registry entry, a command, an option or a configuration key."""

    name: str
    page: str


@final
@dataclass(frozen=True, slots=True)
class Page:
    """A generated page.

    Attributes:
        name: the name of the file, without its suffix.
        title: the heading.
        text: the Markdown.
        entries: what the page describes.
    """

    name: str
    title: str
    text: str
    entries: tuple[Entry, ...] = ()
