"""Which file and line gave a value, and which changed it before: found by replaying the layers when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from stratagem.config.lines import line_of
from stratagem.config.merge import DELETE
from stratagem.config.node import KeyPath, path_text
from stratagem.config.source import Origin, Source

__all__ = ["Change", "History"]


@final
@dataclass(frozen=True, slots=True)
class Change:
    """One layer's say in a value: it gave it, or took it away with what it replaced above."""

    origin: Origin
    value: Any
    removed: bool = False


@final
class History:
    """The layers of one configuration in the order in which they were merged."""

    def __init__(self, layers: tuple[Source, ...]) -> None:
        self.layers = layers

    def add(self, layer: Source) -> None:
        """Put a layer above all others."""
        self.layers = (*self.layers, layer)

    def changes(self, path: KeyPath) -> list[Change]:
        """Return what each layer did to the value at ``path``, in order; a removal only where something was."""
        changes: list[Change] = []
        for layer in self.layers:
            change = _change(layer, path)
            if change is not None and not (change.removed and (not changes or changes[-1].removed)):
                changes.append(change)
        return changes

    def origin(self, path: KeyPath) -> Origin | None:
        """Return where the present value at ``path`` was given; None where no layer gives it."""
        changes = self.changes(path)
        return changes[-1].origin if changes and not changes[-1].removed else None

    def place(self, path: KeyPath) -> str:
        """Return ``"model.depth (config.py:12)"``; for a path that no layer gives, the place of its parent."""
        for end in range(len(path), 0, -1):
            origin = self.origin(path[:end])
            if origin is not None:
                return f"{path_text(path)} ({origin})"
        return path_text(path) or (self.layers[-1].name if self.layers else "")


def _change(layer: Source, path: KeyPath) -> Change | None:
    node: Any = layer.data
    replaces = False
    for depth, key in enumerate(path):
        if isinstance(node, Mapping):
            replaces = replaces or bool(node.get(DELETE, False))
            found = key if key in node else str(key)
            if found not in node:
                return Change(_origin(layer, path[:depth]), None, removed=True) if replaces else None
            node = node[found]
        elif isinstance(node, list | tuple) and str(key).isdigit() and int(key) < len(node):
            replaces = True
            node = node[int(key)]
        else:
            return Change(_origin(layer, path[:depth]), None, removed=True)
    return Change(_origin(layer, path), node)


def _origin(layer: Source, path: KeyPath) -> Origin:
    if layer.suffix:
        return Origin(layer.name, line_of(layer, path))
    return Origin(f"{layer.name} {path_text(path)}" if path else layer.name)
