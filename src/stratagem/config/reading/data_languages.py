"""The languages of data files. Each is a module with the functions ``parse``, ``lines`` and ``write``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from stratagem.config.keys import KeyPath
from stratagem.utils import import_module

__all__ = ["DATA_SUFFIXES", "Language", "language_of"]

# Imported on first use, since most programs need only one of the parsers.
_MODULES = {
    ".json": "stratagem.config.reading.json_files",
    ".toml": "stratagem.config.reading.toml_files",
    ".yaml": "stratagem.config.reading.yaml_files",
    ".yml": "stratagem.config.reading.yaml_files",
}
# The suffixes of data files. Reading such a file never executes code.
DATA_SUFFIXES = frozenset(_MODULES)


class Language(Protocol):
    """The functions of a language module."""

    def parse(self, text: str, name: str) -> Any:
        """Parse ``text`` and return its value; ``name`` is the file name for errors."""

    def lines(self, text: str) -> dict[KeyPath, int]:
        """Return the line of each value, by path."""

    def write(self, data: Mapping[str, Any]) -> str:
        """Return plain data in this language."""


def language_of(suffix: str) -> Language:
    """Return the language for a suffix, which must be in ``DATA_SUFFIXES``."""
    return cast("Language", import_module(_MODULES[suffix]))
