"""The layers of a configuration, and the positions of values in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from stratagem.config.keys import KeyPath
from stratagem.config.reading.name_uses import NO_USES, NameUses

__all__ = ["Origin", "Source"]


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """The place where a value was set: a file and a line number (from 1), or a source such as ``--set`` without a line."""

    path: str
    line: int | None = None

    def __str__(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


@final
@dataclass(frozen=True, slots=True)
class Source:
    """A layer of a configuration: the values of one file, or of the command line, before layers are merged.

    Attributes:
        name: The file, or the source of values without a file, such as ``--set``.
        data: The values.
        text: The contents of the file.
        suffix: The suffix of the language of ``text``, such as ``".yaml"``; empty for a layer without a file.
        list_keys: Whether numeric keys select list items.
        environment: The environment variables that placeholders read.
        modules: The top-level packages that a pure-Python configuration imports lazily.
        written_below: The path in ``text`` that contains the values, such as ``_base_`` for edits of a base.
        uses: The top-level names that the file reads.
        based_on: The names of the files that are bases of this one, directly or indirectly.
    """

    name: str
    data: Mapping[str, Any]
    text: str = ""
    suffix: str = ""
    list_keys: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    written_below: KeyPath = ()
    uses: NameUses = NO_USES
    based_on: frozenset[str] = frozenset()

    @property
    def folder(self) -> Path:
        """The folder that relative paths in this layer refer to."""
        return Path(self.name).parent if self.suffix and not self.name.startswith("<") else Path()
