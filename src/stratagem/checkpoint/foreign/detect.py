"""Detect which program wrote a file, and read the parts that can be used."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from stratagem.checkpoint.foreign.lightning import is_lightning, lightning_parts
from stratagem.checkpoint.foreign.mmengine import is_mmengine, mmengine_parts
from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts
from stratagem.checkpoint.foreign.plain import plain_parts
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError
from stratagem.errors import CheckpointError

__all__ = ["read_parts"]

logger = logging.getLogger(__name__)

_ADVICE = (
    "No code from the file was executed. If you trust the file, save only the tensors in an environment where those classes "
    "are installed: torch.save({'state_dict': model.state_dict()}, 'weights.pth')."
)


def read_parts(checkpoint: LazyCheckpoint, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """Return the parts of a file as a state tree, or only those in ``wanted``.

    The model state and the parts in ``wanted`` must consist of tensors and plain values; other entries that contain objects
    are skipped and logged.

    Raises:
        CheckpointError: if a required part contains objects, or nothing can be read.
    """
    parts = _parts(checkpoint)
    tree: dict[str, Any] = {}
    skipped: dict[str, UnsupportedObjectError] = {}
    for name in parts if wanted is None else [name for name in parts if name in wanted]:
        try:
            tree[name] = parts[name]()
        except UnsupportedObjectError as error:
            if wanted is not None or name == "state_dict" or len(parts) == 1:
                raise CheckpointError(f"{error} {_ADVICE}") from error
            skipped[name] = error
    if skipped and not tree:
        raise CheckpointError(f"{' '.join(map(str, skipped.values()))} {_ADVICE}")
    for name, reason in skipped.items():
        logger.info("Skipped in the checkpoint: %r. %s", name, reason)
    return tree


def _parts(checkpoint: LazyCheckpoint) -> Parts:
    if is_mmengine(checkpoint):
        return mmengine_parts(checkpoint)
    if is_lightning(checkpoint):
        return lightning_parts(checkpoint)
    return plain_parts(checkpoint)
