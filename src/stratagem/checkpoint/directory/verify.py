"""Verify a checkpoint directory against its manifest, and read tensors while verifying them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stratagem.checkpoint.directory.box_io import WrittenBox
from stratagem.checkpoint.directory.extra_files import verify_extra_files
from stratagem.checkpoint.directory.integrity import digest_of
from stratagem.checkpoint.directory.manifest import MANIFEST, MAX_JSON_BYTES, STATE, read_manifest, written_boxes
from stratagem.checkpoint.directory.snapshot import file_of
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.checkpoint.directory.verified_read import read_tensors, verify_boxes
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointDamagedError

__all__ = ["read_verified", "verify_checkpoint"]

# A mapping from parts to the tensors in their file.
_Parts = dict[str, dict[str, Tensor]]


def verify_checkpoint(path: Path, rank_group: RankGroup = SINGLE_PROCESS) -> int:
    """Compare every byte of a checkpoint with the digests in its manifest; return the number of bytes.

    Collective over ``rank_group``: each rank reads a part of the tensors, and all ranks either return or raise.

    Raises:
        CheckpointNotFoundError: if the directory does not exist.
        CheckpointError: if the directory is not a Stratagem checkpoint.
        CheckpointDamagedError: if a file is missing, truncated or modified; the message names the file and the tensor.
    """
    return rank_group.run_all(lambda: _verify_share(path, rank_group, ())[0])[0]


def read_verified(path: Path, parts: Collection[str], rank_group: RankGroup = SINGLE_PROCESS) -> _Parts:
    """Verify a checkpoint as in :func:`verify_checkpoint`; return the tensors of ``parts``, which are read to new memory.

    Each rank reads and verifies all tensors of ``parts``. Parts without tensors are omitted. Collective over ``rank_group``.
    """
    return rank_group.run_checked(lambda: _verify_share(path, rank_group, parts)[1])


def _verify_share(path: Path, rank_group: RankGroup, in_memory: Collection[str]) -> tuple[int, _Parts]:
    """Verify this rank's share; return the number of bytes of the checkpoint, and the tensors of the parts ``in_memory``."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        _check_size(path / name, entry["bytes"])
    _check_digest(path / STATE, manifest["files"][STATE])
    tensors = {}
    for part, described in manifest["tensors"].items():
        file = path / file_of(part)
        layout, boxes = _read_layout(file, manifest, described)
        if part in in_memory:
            tensors[part] = read_tensors(file, layout, boxes)
            continue
        # Assign the largest boxes first, so that all ranks read about the same number of bytes.
        boxes.sort(key=lambda written_box: (-written_box.box.numel, written_box.name, written_box.box))
        verify_boxes(file, layout, boxes[rank_group.rank :: rank_group.size])
    extra_bytes = verify_extra_files(path, manifest.get("beside", {}), slice(rank_group.rank, None, rank_group.size))
    known_bytes: int = sum(entry["bytes"] for entry in manifest["files"].values())
    return extra_bytes + known_bytes, tensors


def _read_layout(
    file: Path, manifest: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[FileLayout, list[WrittenBox]]:
    entry = manifest["files"].get(file.name)
    if entry is None:
        raise CheckpointDamagedError(f"{file.parent / MANIFEST} lists tensors in {file.name}, but not the file itself.")
    header = _check_digest(file, entry["header"])
    try:
        layout = FileLayout.read(header, entry["bytes"])
        return layout, written_boxes(described, layout)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{file}: {error}") from error


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is incomplete.")
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointDamagedError(
            f"{file} has {actual} bytes, but {size} were written: it was truncated or modified."
        )


def _check_digest(file: Path, entry: Mapping[str, Any]) -> bytes:
    """Return the first ``entry["bytes"]`` bytes of a file after comparing their digest with ``entry``."""
    if entry["bytes"] > MAX_JSON_BYTES:
        raise CheckpointDamagedError(f"{file} cannot be read: the manifest lists {entry['bytes']} bytes of JSON.")
    try:
        with file.open("rb") as opened:
            data = opened.read(entry["bytes"])
    except OSError as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if digest_of(data) != entry["digest"]:
        raise CheckpointDamagedError(f"{file} is corrupted: its digest does not match the manifest.")
    return data
