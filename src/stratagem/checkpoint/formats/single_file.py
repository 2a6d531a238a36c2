"""Save and load a checkpoint as a single file in torch's format (``.pth``), for tools that expect it.

Loading executes no code from the file. Checkpoints saved by MMEngine, Lightning or a script with ``torch.save`` can
also be loaded: their weights and, if present, the optimizer state and the training progress; see
:mod:`stratagem.checkpoint.foreign`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.foreign import open_torch_file, read_parts, verify_torch_file
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.flatten import StateTree, flatten_state, unflatten_tree
from stratagem.checkpoint.tree.gather import gather_tensor
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.storage import atomic_file, closing_descriptor, operations, write_fully

__all__ = ["SingleFileFormat", "read_meta"]


@final
class SingleFileFormat:
    """Write and read ``.pth`` files."""

    def save(self, tree: StateTree, path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> None:
        """Write ``tree`` to a temporary file and publish it as ``path`` with a single rename.

        Collective over ``rank_group``: sharded tensors are gathered on the first rank, one at a time.

        Raises:
            CheckpointError: if a value cannot be stored, or the file system reports an error; in that case ``path`` is unchanged.
        """
        staged = self.stage(tree, rank_group)
        staged.write(staged.tensors, path, rank_group)

    def stage(self, tree: StateTree, rank_group: RankGroup = SINGLE_PROCESS) -> StagedState:
        """Flatten ``tree`` to write it later; only sharded tensors are copied. Collective over ``rank_group``.

        Raises:
            CheckpointError: if a value cannot be stored.
        """
        # Flattening rejects values that cannot be loaded with weights_only=True.
        tensors, skeleton = rank_group.run_checked(lambda: flatten_state(tree))
        names = list(tensors)
        gathered = [gather_tensor(tensor, rank_group) for tensor in tensors.values()]

        def write(tensors: Sequence[Tensor], path: Path, rank_group: RankGroup) -> None:
            on_cpu = _with_own_memory(tensor.to("cpu") for tensor in tensors)
            rank_group.run_on_rank0(
                lambda: _write(unflatten_tree(dict(zip(names, on_cpu, strict=True)), skeleton), path)
            )

        return StagedState(gathered if rank_group.is_rank0 else [], write)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        rank_group: RankGroup = SINGLE_PROCESS,
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts.

        A plain state dict is returned as ``{"state_dict": ...}``. The model state and the parts named in ``parts`` must
        consist of tensors and plain values; other entries that contain objects are skipped and logged. Checksums are
        always compared while reading, regardless of ``verify``, because this requires no additional reads. Collective
        over ``rank_group``.

        Raises:
            CheckpointNotFoundError: if the file does not exist.
            CheckpointError: if a required part contains objects that need code to create them, or nothing can be read.
            CheckpointDamagedError: if the file is unreadable.
        """
        return rank_group.run_checked(lambda: _read(path, map_location, parts))

    def verify(self, path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> int:
        """Compare the file with its 32-bit checksums; return its size in bytes. Collective over ``rank_group``.

        Raises:
            CheckpointNotFoundError: if the file does not exist.
            CheckpointDamagedError: if the file is corrupted.
        """
        return rank_group.run_on_rank0(lambda: verify_torch_file(path))


def read_meta(path: Path) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Return the ``meta`` of a file, empty if it has none, and the names of its parts, without reading tensors.

    Raises:
        CheckpointError: (or a subclass) if the file cannot be read; see :meth:`SingleFileFormat.load`.
    """
    with open_torch_file(path, "cpu") as checkpoint:
        meta = read_parts(checkpoint, {"meta"}).get("meta")
        return meta if isinstance(meta, Mapping) else {}, frozenset(map(str, checkpoint.entries))


def _read(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    with open_torch_file(path, device) as checkpoint:
        return read_parts(checkpoint, parts)


def _with_own_memory(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Copy each tensor that has the same address as a tensor of another dtype, since ``torch.save`` rejects them.

    In a memory-mapped checkpoint, an empty tensor has the same address as the next tensor.
    """
    dtypes: dict[int, torch.dtype] = {}
    for tensor in tensors:
        address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        if address and dtypes.setdefault(address, tensor.dtype) != tensor.dtype:
            yield tensor.clone()
        else:
            yield tensor


def _write(tree: Any, path: Path) -> None:
    try:
        with atomic_file(path) as temporary, closing_descriptor(operations.open_file(temporary)) as descriptor:
            _torch_save(_StorageWriter(descriptor), tree)
    except (OSError, RuntimeError) as error:
        raise save_error(path, error) from error


def _torch_save(writer: _StorageWriter, tree: Any) -> None:
    try:
        torch.save(tree, cast("Any", writer))
    except RuntimeError as error:
        # If a write fails, torch reports only an unexpected file position.
        raise writer.failure or error from error


@final
class _StorageWriter:
    """A file-like object for ``torch.save`` that writes through the storage layer."""

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
        """Do nothing, since writes are not buffered."""
