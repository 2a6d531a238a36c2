"""Checkpoints of MMEngine: ``meta``, ``state_dict``, ``optimizer``, ``param_schedulers``, ``message_hub``.

Weights, optimizer, the position of the run and of its schedules are taken over. A schedule's state there holds its
curve too, which here belongs to the configuration, and OneCycleLR's even a function. The message hub holds histories
for display, as objects; nothing here needs them.
"""

from __future__ import annotations

import logging
from typing import Any

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, under
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError, mapping_items

__all__ = ["mmengine_parts", "of_mmengine"]

logger = logging.getLogger(__name__)

_VERSIONS = ("mmengine_version", "mmengine", "mmcv_version")
# Where a schedule stands: numbers alone, under the same names here.
_POSITION = ("_global_step", "last_step")


def of_mmengine(contents: LazyCheckpoint) -> bool:
    """Tell whether MMEngine, or MMCV before it, wrote the file."""
    return any(under(contents.root, "meta", key) is not None for key in _VERSIONS)


def mmengine_parts(contents: LazyCheckpoint) -> Parts:
    """Return the parts that can be taken over, the file's other entries among them."""
    parts = {key: contents.part(key) for key in contents.root if key != "message_hub"}
    if "ema_state_dict" in parts and "optimizer" in parts:
        logger.warning(
            "The checkpoint's weights are averages, as MMEngine's EMAHook saves them. That is right for evaluation and for "
            "load_from; to resume training, have a callback put the trained ones, which are in 'ema_state_dict' under "
            "'module.', back into 'state_dict'."
        )
    parts["meta"] = lambda: _plain_entries(contents)
    if "param_schedulers" in parts:
        parts["param_schedulers"] = lambda: _positions(contents.root["param_schedulers"], contents)
    return parts


def _plain_entries(contents: LazyCheckpoint) -> dict[str, Any]:
    """Return ``meta`` without the objects in it, such as a data set's description."""
    entries = {}
    for key, node in (mapping_items(contents.root["meta"]) or {}).items():
        try:
            entries[key] = contents.read(node, f"meta/{key}")
        except UnsupportedObjectError:
            continue
    return entries


def _positions(node: Any, contents: LazyCheckpoint) -> Any:
    """Return each schedule's position: a list, or name -> list for several optimizers."""
    if isinstance(node, list):
        return [
            {key: contents.read(value, key) for key, value in (mapping_items(state) or {}).items() if key in _POSITION}
            for state in node
        ]
    return {name: _positions(states, contents) for name, states in (mapping_items(node) or {}).items()}
