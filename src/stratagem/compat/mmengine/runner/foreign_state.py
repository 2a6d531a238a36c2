"""Read the parts of MMEngine's checkpoints that consist of its objects: log histories and the state of schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.foreign import open_torch_file
from stratagem.checkpoint.restricted_unpickler import PickledObject, UnsupportedObjectError, mapping_items
from stratagem.compat.mmengine.logging import HistoryBuffer

__all__ = ["read_foreign_state"]

_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
Read = Callable[[Any, str], Any]


def read_foreign_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return ``message_hub`` and ``param_schedulers`` of a checkpoint that MMEngine wrote, without executing code from it.

    Values that need code, such as the functions in the state of ``OneCycleLR``, are omitted. Files of other kinds have no such
    parts.
    """
    file = Path(path)
    if not file.is_file():
        return {}
    state: dict[str, Any] = {}
    with open_torch_file(file, "cpu") as opened:
        if "message_hub" in opened.entries:
            state["message_hub"] = _hub(opened.entries["message_hub"], opened.read)
        if "param_schedulers" in opened.entries:
            state["param_schedulers"] = _without_objects(opened.entries["param_schedulers"], opened.read)
    return state


def _hub(node: Any, read: Read) -> dict[str, Any]:
    parts = mapping_items(node) or {}
    histories = {
        str(name): _history(value, read)
        for name, value in (mapping_items(parts.get("log_scalars")) or {}).items()
        if isinstance(value, PickledObject) and _HISTORY in (value.qualified_name, str(value.args and value.args[0]))
    }
    plain = {name: _without_objects(parts.get(name, {}), read) for name in ("runtime_info", "resumed_keys")}
    kept = {*histories, *plain["runtime_info"]}
    keys = {name: value for name, value in plain["resumed_keys"].items() if name in kept}
    return {"log_scalars": histories, "runtime_info": plain["runtime_info"], "resumed_keys": keys}


def _history(node: PickledObject, read: Read) -> HistoryBuffer:
    state = {
        str(name): read(value, str(name))
        for name, value in (mapping_items(node.state) or {}).items()
        if name in ("max_length", "_log_history", "_count_history")
    }
    return HistoryBuffer(state["_log_history"], state["_count_history"], state["max_length"])


def _without_objects(node: Any, read: Read) -> Any:
    """Return the value of a node without the entries of mappings that contain objects."""
    try:
        return read(node, "state")
    except UnsupportedObjectError:
        if isinstance(node, list | tuple):
            return [_without_objects(item, read) for item in node]
        items = mapping_items(node)
        if not isinstance(items, Mapping):
            raise
    kept = {}
    for key, value in items.items():
        try:
            kept[key] = _without_objects(value, read)
        except UnsupportedObjectError:
            continue
    return kept
