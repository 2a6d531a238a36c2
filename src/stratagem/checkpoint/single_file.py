"""A checkpoint as one file of torch's own form (``.pth``), for tools that expect it.

It is read with ``weights_only=True``: a file that needs more than tensors and plain values is refused, because reading
it would run code that the file chose.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from torch import Tensor

from stratagem.checkpoint.captured import Captured
from stratagem.checkpoint.refusal import not_written
from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.dist import ALONE, Team
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.optim.sharded import is_sharded, whole
from stratagem.storage import atomic_file, opened, operations, write_fully

__all__ = ["SingleFileFormat"]


@final
class SingleFileFormat:
    """Write and read a ``.pth`` file."""

    def save(self, tree: StateTree, path: Path, team: Team = ALONE) -> None:
        """Write ``tree`` aside and publish it under ``path`` by one rename.

        Collective over ``team``: tensors that are spread over ranks are put together, one after the other, in the memory
        of the first rank.

        Raises:
            CheckpointError: if a value cannot be stored, or the file system refuses; what was at ``path`` stays.
        """
        captured = self.capture(tree, team)
        captured.publish(captured.tensors, path, team)

    def capture(self, tree: StateTree, team: Team = ALONE) -> Captured:
        """Take ``tree`` apart, for what is written later; of tensors only those that are spread are copied.

        Collective over ``team``.

        Raises:
            CheckpointError: if a value cannot be stored.
        """
        # Taken apart and put together again, it holds what can be read with weights_only=True, or is refused.
        tensors, skeleton = team.own(lambda: split_tree(tree))
        names = list(tensors)
        whole_ones = [_whole(tensor, keep=team.leads) for tensor in tensors.values()]

        def write(contents: Sequence[Tensor], path: Path, team: Team) -> None:
            here = (content.to("cpu") for content in contents)
            team.first(lambda: _write(join_tree(dict(zip(names, here, strict=True)), skeleton), path))

        return Captured(whole_ones if team.leads else [], write)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        team: Team = ALONE,
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts.

        A file that is a bare state dict is taken as ``{"state_dict": ...}``. Collective over ``team``.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointError: if it holds what only a program could make, or nothing that can be used.
            CheckpointDamagedError: if it cannot be read.
        """
        if verify:
            self.verify(path, team)
        return team.own(lambda: _read(path, map_location, parts))

    def verify(self, path: Path, team: Team = ALONE) -> int:
        """Compare the file with its checksums, 32 bits each; return how many bytes it has. Collective over ``team``.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointDamagedError: if a part of it is not what was written.
        """
        return team.first(lambda: _check(path))


def _read(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    _refuse_missing(path)
    try:
        # Mapped, the tensors of parts that nobody asked for are not read.
        mapped = parts is not None and _kind(path) == "zip"
        loaded = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # which class it is hangs on where the file is damaged
        if isinstance(error, pickle.UnpicklingError) and (kind := _kind(path)) != "damaged zip":
            raise CheckpointError(_refusal(path, error, kind)) from error
        raise CheckpointDamagedError(f"{path} cannot be read: {_first_line(error)}") from error
    tree = _as_tree(loaded, path)
    return tree if parts is None else {name: part for name, part in tree.items() if name in parts}


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a checkpoint with such a name is a single file.")
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")


def _check(path: Path) -> int:
    _refuse_missing(path)
    if _kind(path) == "other":
        # An older form of torch's, without checksums: reading it is the only check.
        return path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # which class it is hangs on where the file is damaged
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
    if bad is not None:
        raise CheckpointDamagedError(f"{path}: {bad} in it is not what was written: its checksum differs.")
    return path.stat().st_size


def _whole(tensor: Tensor, *, keep: bool) -> Tensor:
    """Return a tensor in one piece where it is kept; collective for one that is spread over ranks, then on the CPU."""
    if not is_sharded(tensor):
        return tensor
    gathered = whole(tensor)
    return gathered.to("cpu") if keep else gathered.new_empty(0)


def _write(plain: Any, path: Path) -> None:
    try:
        with atomic_file(path) as aside, opened(operations.open_file(aside)) as descriptor:
            torch.save(plain, cast("Any", _Through(descriptor)))
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from error


@final
class _Through:
    """What torch writes to: it hands all to the storage layer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0

    def write(self, data: bytes | memoryview) -> int:
        write_fully(self._descriptor, data, self._end)
        self._end += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


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
