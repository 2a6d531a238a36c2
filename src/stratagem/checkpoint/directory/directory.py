"""Save and load a checkpoint as a directory of safetensors and JSON files, without pickle.

``model.safetensors`` holds the model state under the names of the model's state dict, as other tools expect it. Every other
part with tensors has a separate safetensors file. ``state.json`` holds everything else; ``manifest.json`` holds the format
version and the size and digests of every file. See ``docs/checkpoint-format.md`` for the specification.

Each rank writes its boxes of sharded tensors directly to their offsets in a shared file, and loading maps the file. Nothing
is gathered, and the files do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stratagem.checkpoint.directory.box_io import WrittenBox, create_file, write_boxes
from stratagem.checkpoint.directory.extra_files import describe_extra_files
from stratagem.checkpoint.directory.integrity import digest_of, parse_json
from stratagem.checkpoint.directory.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    check_replaceable,
    describe_tensors,
    make_manifest,
    read_json_file,
    read_manifest,
)
from stratagem.checkpoint.directory.snapshot import Snapshot, file_of, take_snapshot
from stratagem.checkpoint.directory.verify import read_verified, verify_checkpoint
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.flatten import StateTree, unflatten_tree
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointDamagedError, CheckpointError, StratagemError
from stratagem.storage import atomic_directory, closing_descriptor, operations, write_fully

__all__ = ["DirectoryFormat", "write_snapshot"]


@final
class DirectoryFormat:
    """Write and read checkpoint directories."""

    def save(
        self,
        tree: StateTree,
        path: Path,
        rank_group: RankGroup = SINGLE_PROCESS,
        *,
        write_extra_files: Callable[[Path], None] | None = None,
    ) -> None:
        """Write ``tree`` to a temporary directory and publish it as ``path`` with a single rename.

        Collective over ``rank_group``: each rank passes its own tree and writes the boxes of sharded tensors that it holds; the
        first rank writes everything else. ``write_extra_files`` is called on every rank with the temporary directory, to
        add files in another format.

        Raises:
            CheckpointError: on every rank, if a value cannot be stored, the file system reports an error, or ``path`` is a
                directory that contains other files. In that case ``path`` is unchanged.
        """
        write_snapshot(take_snapshot(tree, rank_group), path, rank_group, write_extra_files=write_extra_files)

    def stage(self, tree: StateTree, rank_group: RankGroup = SINGLE_PROCESS) -> StagedState:
        """Flatten ``tree`` to write it later; tensors are not copied. Collective over ``rank_group``.

        Raises:
            CheckpointError: if a value cannot be stored.
        """
        snapshot = take_snapshot(tree, rank_group)
        # Do not capture the tensors in write(): they would stay in memory together with their copies.
        plan, skeletons = snapshot.plan, snapshot.skeletons
        keys = list(snapshot.local_boxes)

        def write(tensors: Sequence[Tensor], path: Path, rank_group: RankGroup) -> None:
            write_snapshot(Snapshot(plan, skeletons, dict(zip(keys, tensors, strict=True))), path, rank_group)

        return StagedState(list(snapshot.local_boxes.values()), write)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        rank_group: RankGroup = SINGLE_PROCESS,
        in_memory: Collection[str] = (),
    ) -> StateTree:
        """Read the state tree, or only some of its top-level parts.

        CPU tensors are memory-mapped: unused ones are not read, and writing to a tensor does not change the file.
        Collective over ``rank_group``; each rank verifies a part of the data.

        Args:
            path: the checkpoint directory.
            map_location: the device of the tensors.
            parts: the names of the parts to read; all by default.
            verify: whether to compare every byte with its digest.
            rank_group: the ranks that load the same checkpoint.
            in_memory: with ``verify``, the parts that each rank reads to memory while it verifies them, instead of mapping
                them. Each tensor has separate memory, which the caller may keep and modify.

        Raises:
            CheckpointNotFoundError: if the directory does not exist.
            CheckpointError: if the directory is not a Stratagem checkpoint.
            CheckpointDamagedError: if a file or tensor is missing or corrupted.
        """
        wanted = set(in_memory) if parts is None else set(in_memory) & set(parts)
        read = read_verified(path, wanted, rank_group) if verify else {}
        return rank_group.run_checked(lambda: _read_tree(path, map_location, parts, read))

    def verify(self, path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> int:
        """Compare every byte with its digest; see :func:`~stratagem.checkpoint.directory.verify.verify_checkpoint`."""
        return verify_checkpoint(path, rank_group)


def write_snapshot(
    snapshot: Snapshot,
    path: Path,
    rank_group: RankGroup = SINGLE_PROCESS,
    *,
    write_extra_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a snapshot to a temporary directory, sync it, and publish it with a single rename.

    Collective over ``rank_group``.

    Raises:
        CheckpointError: on every rank, if the file system reports an error on any rank; in that case ``path`` is
            unchanged.
    """
    rank_group.run_on_rank0(lambda: _check_target(snapshot, path))
    try:
        with ExitStack() as stack:
            folder = rank_group.run_on_rank0(lambda: _create_files(stack, snapshot, path))
            written = rank_group.run_all(lambda: _write_local_boxes(folder, snapshot, rank_group))
            if write_extra_files is not None:
                rank_group.run_all(lambda: write_extra_files(folder))
            rank_group.run_on_rank0(lambda: _write_manifest(folder, snapshot, written))
            # Sync the directory, rename it and sync the parent.
            rank_group.run_on_rank0(stack.close)
    except CheckpointError:
        raise
    except (OSError, ValueError, StratagemError) as error:
        raise save_error(path, error) from error


def _read_tree(
    path: Path, device: torch.device | str, parts: Collection[str] | None, read: Mapping[str, dict[str, Tensor]]
) -> StateTree:
    """Read the tree; ``read`` holds the tensors of parts that have been read already."""
    manifest = read_manifest(path)
    tree = {}
    for name, skeleton in _read_skeletons(path, manifest).items():
        if parts is not None and name not in parts:
            continue
        if name in read:
            tensors = {key: tensor.to(device) for key, tensor in read[name].items()}
        else:
            tensors = _map_tensors(path / file_of(name), device) if name in manifest["tensors"] else {}
        try:
            tree[name] = unflatten_tree(tensors, skeleton)
        except CheckpointDamagedError as error:
            raise CheckpointDamagedError(f"{path / file_of(name)}: {error}") from error
    return tree


def _check_target(snapshot: Snapshot, path: Path) -> None:
    """Check before writing that ``path`` may be replaced and that there is enough free space."""
    check_replaceable(path)
    needed = snapshot.plan.size
    parent = next((folder for folder in path.parents if folder.exists()), path.anchor)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{path}: the checkpoint requires {needed} bytes, but only {free} bytes are free. Free some disk space, "
            "keep fewer checkpoints (max_keep_ckpts), or save to a different disk."
        )


def _create_files(stack: ExitStack, snapshot: Snapshot, path: Path) -> Path:
    """Create the directory and its files, each with its full size and header but without tensors."""
    folder = stack.enter_context(atomic_directory(path))
    _write_new(folder / STATE, _as_json(snapshot.skeletons))
    for part, layout in snapshot.plan.layouts.items():
        create_file(folder / file_of(part), layout)
    return folder


def _write_local_boxes(folder: Path, snapshot: Snapshot, rank_group: RankGroup) -> dict[str, list[WrittenBox]]:
    """Write this rank's boxes; return them by part."""
    written = {}
    for part, layout in snapshot.plan.layouts.items():
        boxes = list(snapshot.boxes_of(part))
        if not boxes:
            continue
        try:
            written[part] = write_boxes(folder / file_of(part), layout, boxes)
        except FileNotFoundError as error:
            if rank_group.is_rank0:
                raise
            raise CheckpointError(
                f"{folder.parent}: rank {rank_group.rank} cannot see the files that the first rank has created. "
                "Sharded models must be saved to a folder that all ranks share. Set work_dir to such a folder."
            ) from error
    return written


def _write_manifest(folder: Path, snapshot: Snapshot, written: list[dict[str, list[WrittenBox]]]) -> None:
    """Write the manifest last, because a directory without a manifest is not a checkpoint."""
    state = _as_json(snapshot.skeletons)
    files: dict[str, dict[str, Any]] = {STATE: {"bytes": len(state), "digest": digest_of(state)}}
    tensors = {}
    for part, layout in snapshot.plan.layouts.items():
        header = {"bytes": len(layout.header), "digest": digest_of(layout.header)}
        files[file_of(part)] = {"bytes": layout.size, "header": header}
        tensors[part] = describe_tensors(layout, [box for by_part in written for box in by_part.get(part, ())])
    extra_files = describe_extra_files(folder, files)
    _write_new(folder / MANIFEST, make_manifest(snapshot.skeletons.get("meta"), files, tensors, extra_files))


def _as_json(content: Any) -> bytes:
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"The non-tensor values of the checkpoint require {len(data)} bytes as JSON, but at most {MAX_JSON_BYTES} "
            "bytes are supported. Store long lists of numbers as tensors."
        )
    return data


def _write_new(file: Path, data: bytes) -> None:
    with closing_descriptor(operations.create_file(file)) as descriptor:
        write_fully(descriptor, data, 0)
        operations.fsync(descriptor)


def _read_skeletons(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    file = path / STATE
    try:
        data = read_json_file(file)
        if digest_of(data) != manifest["files"][STATE]["digest"]:
            raise CheckpointDamagedError(f"{file} is corrupted: its digest does not match the manifest.")
        skeletons = parse_json(data)
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if not isinstance(skeletons, dict):
        raise CheckpointDamagedError(f"{file} cannot be read: it has no parts.")
    return skeletons


def _map_tensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened_file:
            names: list[str] = opened_file.keys()
            tensors = {name: opened_file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    # Move the tensors after reading, since safetensors supports only some devices, and an unsupported device must not
    # be reported as damage.
    return {name: tensor.to(device) for name, tensor in tensors.items()}
