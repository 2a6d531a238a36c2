"""Access the entries of another program's file before their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from stratagem.checkpoint.restricted_unpickler import is_tensor, mapping_items

__all__ = ["LazyCheckpoint", "Parts", "is_optimizer_state", "is_state_dict", "get_nested"]

# A mapping from parts of the state tree to functions that read them.
Parts = dict[str, Callable[[], Any]]


@final
@dataclass(frozen=True, slots=True)
class LazyCheckpoint:
    """An opened file whose values are not yet read: ``root`` is its root node, and ``entries`` maps keys to nodes.

    ``read(node, where)`` returns the value of a node; ``where`` is its name in error messages.
    """

    root: Any
    entries: Mapping[Any, Any]
    read: Callable[[Any, str], Any]

    def reader(self, key: str) -> Callable[[], Any]:
        """Return a function that reads the entry ``key``."""
        return lambda: self.read(self.entries[key], key)


def get_nested(node: Any, *path: Any) -> Any:
    """Return the node at a path of keys below ``node``, or None if it does not exist."""
    for key in path:
        items = mapping_items(node)
        if items is None or key not in items:
            return None
        node = items[key]
    return node


def is_state_dict(node: Any) -> bool:
    """Return whether a node is a mapping that contains tensors."""
    items = mapping_items(node)
    return items is not None and any(is_tensor(value) for value in items.values())


def is_optimizer_state(node: Any) -> bool:
    """Return whether a node is the state dict of a torch optimizer."""
    return {"state", "param_groups"} <= set(mapping_items(node) or ())
