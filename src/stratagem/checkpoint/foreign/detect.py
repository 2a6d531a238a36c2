"""Tell which program wrote a file, and read the parts of it that can be taken over."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from stratagem.checkpoint.foreign.lightning import lightning_parts, of_lightning
from stratagem.checkpoint.foreign.mmengine import mmengine_parts, of_mmengine
from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts
from stratagem.checkpoint.foreign.plain import plain_parts
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError
from stratagem.errors import CheckpointError

__all__ = ["read_parts"]

logger = logging.getLogger(__name__)

_TO_DO = (
    "Nothing of it was executed. Save the tensors alone where those classes are installed, and only if you trust the "
    "file: torch.save({'state_dict': model.state_dict()}, 'weights.pth')."
)


def read_parts(contents: LazyCheckpoint, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """Return the parts of our state tree that a file has, or those of them that are wanted.

    What is wanted by name, and the model's state always, must be tensors and plain values; other entries with objects
    in them are left out, and the log says which.

    Raises:
        CheckpointError: if something that must be read holds objects, or nothing can be read at all.
    """
    parts = _parts(contents)
    tree: dict[str, Any] = {}
    left: dict[str, UnsupportedObjectError] = {}
    for name in parts if wanted is None else [name for name in parts if name in wanted]:
        try:
            tree[name] = parts[name]()
        except UnsupportedObjectError as error:
            if wanted is not None or name == "state_dict" or len(parts) == 1:
                raise CheckpointError(f"{error} {_TO_DO}") from error
            left[name] = error
    if left and not tree:
        raise CheckpointError(f"{' '.join(map(str, left.values()))} {_TO_DO}")
    for name, reason in left.items():
        logger.info("Left out of the checkpoint: %r. %s", name, reason)
    return tree


def _parts(contents: LazyCheckpoint) -> Parts:
    if of_mmengine(contents):
        return mmengine_parts(contents)
    if of_lightning(contents):
        return lightning_parts(contents)
    return plain_parts(contents)
