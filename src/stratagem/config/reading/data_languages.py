"""The languages of data files, each in a module with ``parse``, ``lines`` and ``write``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from stratagem.config.keys import KeyPath
from stratagem.utils import import_module

__all__ = ["DATA_SUFFIXES", "Language", "language_of"]

# By name: YAML and TOML load libraries that most programs do without.
_MODULES = {
    ".json": "stratagem.config.reading.json_files",
    ".toml": "stratagem.config.reading.toml_files",
    ".yaml": "stratagem.config.reading.yaml_files",
    ".yml": "stratagem.config.reading.yaml_files",
}
# The files that are data: reading one never runs code, whoever wrote it.
DATA_SUFFIXES = frozenset(_MODULES)


class Language(Protocol):
    """What is known of a language."""

    def parse(self, text: str, name: str) -> Any:
        """Return the values in a text; ``name`` stands for it in errors."""

    def lines(self, text: str) -> dict[KeyPath, int]:
        """Return the line of each value."""

    def write(self, data: Mapping[str, Any]) -> str:
        """Return a text for plain data."""


def language_of(suffix: str) -> Language:
    """Return the language of data files with this suffix, which is one of ``DATA_SUFFIXES``."""
    return cast("Language", import_module(_MODULES[suffix]))
