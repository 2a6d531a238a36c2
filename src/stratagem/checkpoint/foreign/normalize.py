"""What a file of another program holds, before any of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from stratagem.checkpoint.restricted_unpickler import is_tensor, mapping_items

__all__ = ["LazyCheckpoint", "Parts", "is_optimizer_state", "is_state_dict", "under"]

# PickledGlobal of a part of our state tree -> how to read it.
Parts = dict[str, Callable[[], Any]]


@final
@dataclass(frozen=True, slots=True)
class LazyCheckpoint:
    """The top of a file: ``whole`` as a node, ``root`` as key -> node.

    ``read`` returns the value of a node, and is told what errors shall call it.
    """

    whole: Any
    root: Mapping[Any, Any]
    read: Callable[[Any, str], Any]

    def part(self, key: str) -> Callable[[], Any]:
        """Return what reads the file's ``key``."""
        return lambda: self.read(self.root[key], key)


def under(node: Any, *path: Any) -> Any:
    """Return the node below ``node`` at a path of keys, or None where there is none."""
    for key in path:
        items = mapping_items(node)
        if items is None or key not in items:
            return None
        node = items[key]
    return node


def is_state_dict(node: Any) -> bool:
    """Tell whether a node is a mapping with tensors."""
    items = mapping_items(node)
    return items is not None and any(is_tensor(value) for value in items.values())


def is_optimizer_state(node: Any) -> bool:
    """Tell whether a node is what an optimizer of torch gives as its state."""
    return {"state", "param_groups"} <= set(mapping_items(node) or ())
