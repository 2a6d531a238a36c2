"""A checkpoint as one file of torch's own form (``.pth``), for tools that expect it.

Reading one executes nothing from it, whoever wrote it: files of MMEngine, Lightning and plain scripts are read as well,
their weights and, where they have it, optimizer state and position; see :mod:`stratagem.checkpoint.foreign`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.foreign import open_torch_file, read_parts, verify_torch_file
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.flatten import StateTree, flatten_state, unflatten_tree
from stratagem.checkpoint.tree.gather import gather_tensor
from stratagem.distributed import ALONE, Team
from stratagem.storage import atomic_file, opened, operations, write_fully

__all__ = ["SingleFileFormat", "read_meta"]


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
        staged = self.stage(tree, team)
        staged.write(staged.tensors, path, team)

    def stage(self, tree: StateTree, team: Team = ALONE) -> StagedState:
        """Take ``tree`` apart, for what is written later; of tensors only those that are spread are copied.

        Collective over ``team``.

        Raises:
            CheckpointError: if a value cannot be stored.
        """
        # Taken apart and put together again, it holds what can be read with weights_only=True, or is refused.
        tensors, skeleton = team.own(lambda: flatten_state(tree))
        names = list(tensors)
        whole_ones = [gather_tensor(tensor, team) for tensor in tensors.values()]

        def write(contents: Sequence[Tensor], path: Path, team: Team) -> None:
            here = (content.to("cpu") for content in contents)
            team.first(lambda: _write(unflatten_tree(dict(zip(names, here, strict=True)), skeleton), path))

        return StagedState(whole_ones if team.leads else [], write)

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

        A file that is a bare state dict is taken as ``{"state_dict": ...}``. What ``parts`` names, and the model's state
        always, must be tensors and plain values; other entries with objects in them are left out, and the log says so.
        What is read is compared with its checksums, whatever ``verify`` says: it costs no second reading. Collective over
        ``team``.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointError: if what is read holds objects that only code could make, or nothing can be used.
            CheckpointDamagedError: if it cannot be read.
        """
        return team.own(lambda: _read(path, map_location, parts))

    def verify(self, path: Path, team: Team = ALONE) -> int:
        """Compare the file with its checksums, 32 bits each; return how many bytes it has. Collective over ``team``.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointDamagedError: if a part of it is not what was written.
        """
        return team.first(lambda: verify_torch_file(path))


def read_meta(path: Path) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Return the ``meta`` of a file, empty if it has none, and the names of its parts. No tensor is read.

    Raises:
        CheckpointError: (or a subclass) if it cannot be read; see :meth:`SingleFileFormat.load`.
    """
    with open_torch_file(path, "cpu") as contents:
        meta = read_parts(contents, {"meta"}).get("meta")
        return meta if isinstance(meta, Mapping) else {}, frozenset(map(str, contents.root))


def _read(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    with open_torch_file(path, device) as contents:
        return read_parts(contents, parts)


def _write(plain: Any, path: Path) -> None:
    try:
        with atomic_file(path) as aside, opened(operations.open_file(aside)) as descriptor:
            _save_through(_Through(descriptor), plain)
    except (OSError, RuntimeError) as error:
        raise save_error(path, error) from error


def _save_through(through: _Through, plain: Any) -> None:
    try:
        torch.save(plain, cast("Any", through))
    except RuntimeError as error:
        # torch tells of a write that failed only that its place in the file is not what it expects.
        raise through.failure or error from error


@final
class _Through:
    """What torch writes to: it hands all to the storage layer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            write_fully(self._descriptor, data, self._end)
        except OSError as error:
            self.failure = error
            raise
        self._end += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
