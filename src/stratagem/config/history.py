"""Find which files and lines set or changed a value, by replaying the layers of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

from stratagem.config.keys import KeyPath, path_text
from stratagem.config.merge import DELETE
from stratagem.config.reading.lines import line_of
from stratagem.config.reading.source import Origin, Source

__all__ = ["Change", "ChangeKind", "History"]


class ChangeKind(StrEnum):
    """The kind of change that a layer made to a value."""

    SET = "set"
    REPLACED = "replaced"
    MERGED = "merged"
    REMOVED = "removed"


@final
@dataclass(frozen=True, slots=True)
class Change:
    """A change of a value by one layer. ``value`` is the value in that layer, which may be only a part of a merged dict."""

    origin: Origin
    kind: ChangeKind
    value: Any


@final
@dataclass(frozen=True, slots=True)
class History:
    """The layers of a configuration, in the order in which they were merged."""

    layers: tuple[Source, ...]

    def changes(self, path: KeyPath) -> list[Change]:
        """Return the change of the value at ``path`` by each layer, in order."""
        changes: list[Change] = []
        for layer in self.layers:
            found = _layer_value(layer, path)
            there = bool(changes) and changes[-1].kind is not ChangeKind.REMOVED
            if found is None or (found.value is _NOTHING and not there):
                continue
            if found.value is _NOTHING:
                changes.append(Change(found.origin, ChangeKind.REMOVED, None))
            elif there and not found.replaces and isinstance(found.value, Mapping):
                changes.append(Change(found.origin, ChangeKind.MERGED, found.value))
            else:
                changes.append(Change(found.origin, ChangeKind.REPLACED if there else ChangeKind.SET, found.value))
        return changes

    def last(self, path: KeyPath) -> Change | None:
        """Return the last change that set or replaced the value at ``path``; None if no layer sets it."""
        whole = [change for change in self.changes(path) if change.kind is not ChangeKind.MERGED]
        return whole[-1] if whole and whole[-1].kind is not ChangeKind.REMOVED else None

    def position(self, path: KeyPath) -> str:
        """Return the path with the file and line that set it or its parent, such as ``"model.depth (config.py:12)"``."""
        for end in range(len(path), 0, -1):
            change = self.last(path[:end])
            if change is not None:
                return f"{path_text(path)} ({change.origin})"
        return path_text(path) or (self.layers[-1].name if self.layers else "")


_NOTHING = object()


@final
@dataclass(frozen=True, slots=True)
class _LayerValue:
    """The value of one layer at a path, or ``_NOTHING``, and whether it replaces the value of earlier layers."""

    origin: Origin
    value: Any
    replaces: bool


def _layer_value(layer: Source, path: KeyPath) -> _LayerValue | None:
    node: Any = layer.data
    replaces = False
    for depth, key in enumerate(path):
        if isinstance(node, Mapping):
            found = key if key in node else str(key)
            if found not in node:
                return _LayerValue(_origin(layer, path[:depth]), _NOTHING, replaces) if replaces else None
            node = node[found]
            replaces = replaces or not isinstance(node, Mapping) or bool(node.get(DELETE, False))
        elif isinstance(node, list | tuple) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            return _LayerValue(_origin(layer, path[:depth]), _NOTHING, replaces)
    return _LayerValue(_origin(layer, path), node, replaces)


def _origin(layer: Source, path: KeyPath) -> Origin:
    if layer.suffix:
        return Origin(layer.name, line_of(layer, path))
    return Origin(f"{layer.name} {path_text(path)}" if path else layer.name)
