"""Paths of keys through nested configurations."""

from __future__ import annotations

from stratagem.utils.printable import printable_name

__all__ = ["KeyPath", "parse_path", "path_text"]

KeyPath = tuple[str | int, ...]


def path_text(path: KeyPath) -> str:
    """Return the dotted form of a path of keys and list indices, such as ``model.layers.0.depth``, in one printable line."""
    return ".".join(map(printable_name, path))


def parse_path(text: str) -> KeyPath:
    """Return the keys and list indices of a dotted path such as ``model.layers.0.depth``."""
    return tuple(int(key) if key.isdigit() else key for key in text.split("."))
