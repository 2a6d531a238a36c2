"""Compare a checkpoint directory with what its manifest says was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.directory.box_io import WrittenBox, verify_boxes
from stratagem.checkpoint.directory.extra_files import verify_extra_files
from stratagem.checkpoint.directory.integrity import digest_of
from stratagem.checkpoint.directory.manifest import MANIFEST, MOST_JSON, STATE, read_manifest, written_boxes
from stratagem.checkpoint.directory.snapshot import file_of
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.distributed import ALONE, Team
from stratagem.errors import CheckpointDamagedError

__all__ = ["verify_checkpoint"]


def verify_checkpoint(path: Path, team: Team = ALONE) -> int:
    """Compare every byte of a checkpoint with the digests of its manifest; return how many bytes there are.

    Collective over ``team``: each rank reads a share of the tensors, and all come to the same end.

    Raises:
        CheckpointNotFoundError: if there is no such directory.
        CheckpointError: if it is not one of ours.
        CheckpointDamagedError: if a file is missing, cut off or changed; it names the file and the tensor.
    """
    return team.each(lambda: _verify_share(path, team))[0]


def _verify_share(path: Path, team: Team) -> int:
    manifest = read_manifest(path)
    for name, said in manifest["files"].items():
        _check_size(path / name, said["bytes"])
    _check_digest(path / STATE, manifest["files"][STATE])
    for part, described in manifest["tensors"].items():
        file = path / file_of(part)
        layout, pieces = _read_layout(file, manifest, described)
        # The largest first, so that every rank gets about as many bytes.
        pieces.sort(key=lambda piece: (-piece.box.numel, piece.name, piece.box))
        verify_boxes(file, layout, pieces[team.rank :: team.size])
    extra_bytes = verify_extra_files(path, manifest.get("beside", {}), slice(team.rank, None, team.size))
    ours: int = sum(said["bytes"] for said in manifest["files"].values())
    return extra_bytes + ours


def _read_layout(
    file: Path, manifest: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[FileLayout, list[WrittenBox]]:
    said = manifest["files"].get(file.name)
    if said is None:
        raise CheckpointDamagedError(f"{file.parent / MANIFEST} has tensors of {file.name}, but not the file.")
    header = _check_digest(file, said["header"])
    try:
        layout = FileLayout.read(header, said["bytes"])
        return layout, written_boxes(described, layout)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{file}: {error}") from error


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointDamagedError(f"{file} has {actual} bytes, but {size} were written: it was cut off or changed.")


def _check_digest(file: Path, said: Mapping[str, Any]) -> bytes:
    """Return the first bytes of a file, as many as were said to have that digest."""
    if said["bytes"] > MOST_JSON:
        raise CheckpointDamagedError(f"{file} cannot be read: its JSON is said to have {said['bytes']} bytes.")
    try:
        with file.open("rb") as opened:
            data = opened.read(said["bytes"])
    except OSError as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if digest_of(data) != said["digest"]:
        raise CheckpointDamagedError(f"{file} is not what was written: its digest differs.")
    return data
