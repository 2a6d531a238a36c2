"""A checkpoint as one file of torch's own form (``.pth``), for tools that expect it.

It is read with ``weights_only=True``: a file that needs more than tensors and plain values is refused, because reading
it would run code that the file chose.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, final

import torch

from stratagem.checkpoint.refusal import not_written
from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_file

__all__ = ["SingleFileFormat"]


@final
class SingleFileFormat:
    """Write and read a ``.pth`` file."""

    def save(self, tree: StateTree, path: Path) -> None:
        """Write ``tree`` aside and publish it under ``path`` by one rename.

        Raises:
            CheckpointError: if a value cannot be stored, or the file system refuses; what was at ``path`` stays.
        """
        # Taken apart and put together again, it holds what can be read with weights_only=True, or is refused.
        plain = join_tree(*split_tree(tree))
        try:
            with atomic_file(path) as aside:
                torch.save(plain, aside)
        except (OSError, RuntimeError) as error:
            raise not_written(path, error) from error

    def load(
        self, path: Path, *, map_location: torch.device | str = "cpu", parts: Collection[str] | None = None
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts.

        A file that is a bare state dict is taken as ``{"state_dict": ...}``.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointError: if it holds what only a program could make, or nothing that can be used.
            CheckpointDamagedError: if it cannot be read.
        """
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; a checkpoint with such a name is a single file.")
        if not path.is_file():
            raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
        try:
            loaded = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # which class it is hangs on where the file is damaged
            if isinstance(error, pickle.UnpicklingError) and (kind := _kind(path)) != "damaged zip":
                raise CheckpointError(_refusal(path, error, kind)) from error
            raise CheckpointDamagedError(f"{path} cannot be read: {_first_line(error)}") from error
        tree = _as_tree(loaded, path)
        return tree if parts is None else {name: part for name, part in tree.items() if name in parts}


def _as_tree(loaded: Any, path: Path) -> StateTree:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; a checkpoint is a dict.")
    if "state_dict" in loaded or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    return {"state_dict": loaded}


def _kind(path: Path) -> Literal["zip", "damaged zip", "other"]:
    """Tell a whole file of torch's form, which is a zip, from one that was cut off and from anything else."""
    try:
        if zipfile.is_zipfile(path):
            return "zip"
    except zipfile.BadZipFile:
        return "damaged zip"
    with path.open("rb") as file:
        return "damaged zip" if file.read(4) == b"PK\x03\x04" else "other"


def _refusal(path: Path, error: Exception, kind: str) -> str:
    if kind == "other":
        return f"{path} is not a checkpoint: torch cannot read it ({_first_line(error)})."
    return (
        f"{path} holds objects that only running code of the file's choice could make, so it is not read: "
        f"{_first_line(error)} If you trust where it came from, load it once with torch.load(path, weights_only=False) "
        "and save its tensors again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
