"""What was read: one layer of a configuration, with the text that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from stratagem.config.keys import KeyPath

__all__ = ["Origin", "Source"]


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was given: a file and its line (from 1), or a word such as ``--set`` and no line."""

    path: str
    line: int | None = None

    def __str__(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


@final
@dataclass(frozen=True, slots=True)
class Source:
    """One layer: what a file (or the command line) says by itself, before anything is merged.

    ``suffix`` names the language of ``text`` (``".py"``, ``".yaml"`` ...) and is empty for a layer without a file,
    such as overrides. ``list_keys`` tells that keys of digits mean items of lists. ``environment`` are the variables
    that placeholders used, ``modules`` the top packages that a pure-Python configuration names without importing them.
    ``written_below`` is the path in ``text`` below which the values are, as ``_base_`` is for edits of a base.
    """

    name: str
    data: Mapping[str, Any]
    text: str = ""
    suffix: str = ""
    list_keys: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    written_below: KeyPath = ()

    @property
    def folder(self) -> Path:
        """The folder that relative paths in this layer start from."""
        return Path(self.name).parent if self.suffix and not self.name.startswith("<") else Path()
