"""Read MMEngine checkpoints: ``meta``, ``state_dict``, ``optimizer``, ``param_schedulers``, ``message_hub``.

Weights, optimizer state, and the progress of the run and its schedulers are converted. MMEngine's scheduler state also
includes the parameters of the schedule (for OneCycleLR, a function), which Stratagem reads from the configuration. The
message hub stores log histories as Python objects and is ignored.
"""

from __future__ import annotations

import logging
from typing import Any

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, get_nested
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError, mapping_items

__all__ = ["mmengine_parts", "is_mmengine"]

logger = logging.getLogger(__name__)

_VERSIONS = ("mmengine_version", "mmengine", "mmcv_version")
# The keys that record the progress of a scheduler. They have the same names in Stratagem.
_POSITION = ("_global_step", "last_step")


def is_mmengine(checkpoint: LazyCheckpoint) -> bool:
    """Return whether MMEngine or its predecessor MMCV wrote the file.

    The files that :mod:`stratagem.compat.mmengine` writes have the same layout, but need no conversion.
    """
    if get_nested(checkpoint.entries, "meta", "stratagem") is not None:
        return False
    return any(get_nested(checkpoint.entries, "meta", key) is not None for key in _VERSIONS)


def mmengine_parts(checkpoint: LazyCheckpoint) -> Parts:
    """Return the parts that can be used, including the file's other entries."""
    parts = {key: checkpoint.reader(key) for key in checkpoint.entries if key != "message_hub"}
    if "ema_state_dict" in parts and "optimizer" in parts:
        logger.warning(
            "The checkpoint's 'state_dict' contains averaged weights, as saved by MMEngine's EMAHook. Use them for evaluation "
            "and for load_from. To resume training, restore the trained weights in a callback: copy the entries of "
            "'ema_state_dict' that start with 'module.' to 'state_dict'."
        )
    parts["meta"] = lambda: _plain_entries(checkpoint)
    if "param_schedulers" in parts:
        parts["param_schedulers"] = lambda: _positions(checkpoint.entries["param_schedulers"], checkpoint)
    return parts


def _plain_entries(checkpoint: LazyCheckpoint) -> dict[str, Any]:
    """Return ``meta`` without entries that contain objects, such as the metadata of a dataset."""
    entries = {}
    for key, node in (mapping_items(checkpoint.entries["meta"]) or {}).items():
        try:
            entries[key] = checkpoint.read(node, f"meta/{key}")
        except UnsupportedObjectError:
            continue
    return entries


def _positions(node: Any, checkpoint: LazyCheckpoint) -> Any:
    """Return the progress of each scheduler: a list, or a mapping from name to list for several optimizers."""
    if isinstance(node, list):
        return [
            {
                key: checkpoint.read(value, key)
                for key, value in (mapping_items(state) or {}).items()
                if key in _POSITION
            }
            for state in node
        ]
    return {name: _positions(states, checkpoint) for name, states in (mapping_items(node) or {}).items()}
