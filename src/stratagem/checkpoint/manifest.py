"""What a checkpoint directory says of itself: its form, its files and tensors, and where its run stood."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.digest import ALGORITHM, digest_of
from stratagem.checkpoint.layout import DTYPES, FileLayout
from stratagem.checkpoint.regions import Region
from stratagem.checkpoint.slices import WrittenPiece
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = [
    "FILE_NAME",
    "MANIFEST",
    "STATE",
    "describe_tensors",
    "make_manifest",
    "pieces_of",
    "read_manifest",
    "refuse_foreign",
]

MANIFEST = "manifest.json"
STATE = "state.json"
# What is a file's name on every system, and stays inside of the directory.
FILE_NAME = re.compile(r"[^./\\:\x00][^/\\:\x00]*")
_FORMAT = "stratagem-checkpoint"
_VERSION = 2
# The text ends in the digest of all before it.
_SEAL = re.compile(rb'\A(.*),"digest":"([0-9a-f]{64})"}\Z', re.DOTALL)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory: what it is, its files and where its run stood.

    Raises:
        CheckpointNotFoundError: if there is no such directory.
        CheckpointError: if it is not a checkpoint of ours, or of another version.
        CheckpointDamagedError: if the manifest cannot be read, or is not what was written.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    file = path / MANIFEST
    if not file.is_file():
        if (path / STATE).is_file():
            raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
        raise CheckpointError(
            f"{path} is not a checkpoint of Stratagem: it has no {MANIFEST}. A checkpoint is a directory such as "
            "work_dirs/<name>/epoch_3, or a single .pth file."
        )
    data, manifest = _read(file)
    if not _is_ours(manifest):
        raise CheckpointError(f"{file} belongs to another program; this is not a checkpoint of Stratagem.")
    sealed = _SEAL.fullmatch(data)
    if manifest.get("version") == _VERSION and (sealed is None or digest_of(sealed[1]) != sealed[2].decode()):
        raise CheckpointDamagedError(f"{file} is not what was written: its digest differs.")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: the checkpoint has version {manifest.get('version')} of the format, this Stratagem reads version "
            f"{_VERSION}. Read it with the version that wrote it ({manifest.get('stratagem')})."
        )
    if not _is_complete(manifest):
        raise CheckpointDamagedError(f"{file} cannot be read: it does not say what was written, or when.")
    return manifest


def make_manifest(meta: Any, files: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the text of a manifest.

    Args:
        meta: the tree's part of that name, from which the position, the run and the purpose are taken.
        files: name -> its size and digests.
        tensors: part -> what :func:`describe_tensors` says of it.
    """
    meta = meta if isinstance(meta, Mapping) else {}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "stratagem": meta.get("stratagem"),
        "saved_at": time.time(),
        "run_id": meta.get("run_id"),
        "purpose": meta.get("purpose"),
        "position": {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)},
        "finite": meta.get("finite") is not False,
        "algorithm": ALGORITHM,
        "files": dict(files),
        "tensors": dict(tensors),
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return text + b',"digest":"' + digest_of(text).encode() + b'"}'


def describe_tensors(layout: FileLayout, written: Iterable[WrittenPiece]) -> dict[str, Any]:
    """Return what the manifest says of the tensors of a file: type, shape, and the digest of each piece."""
    described: dict[str, Any] = {
        name: {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "pieces": []}
        for name, spec in layout.specs.items()
    }
    for piece in written:
        described[piece.name]["pieces"].append([list(piece.region.start), list(piece.region.shape), piece.digest])
    return described


def pieces_of(described: Mapping[str, Any]) -> list[WrittenPiece]:
    """Return the pieces that a manifest describes for the tensors of a file."""
    return [
        WrittenPiece(name, Region(tuple(start), tuple(shape)), digest)
        for name, tensor in described.items()
        for start, shape, digest in tensor["pieces"]
    ]


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a folder that holds something else: all in it would be lost.

    Raises:
        CheckpointError: if it is not empty and no checkpoint of ours, sound or damaged.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        ours = _is_ours(_read(path / MANIFEST)[1])
    except CheckpointDamagedError:
        ours = (path / STATE).is_file()
    if not ours:
        raise CheckpointError(
            f"{path} is a folder with something other than a checkpoint, which saving would replace. Choose a name in it, "
            f"such as {path / 'checkpoint'}."
        )


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the manifest says what this version needs, in the form that it needs."""
    saved_at, files, tensors = manifest.get("saved_at"), manifest.get("files"), manifest.get("tensors")
    return (
        isinstance(saved_at, float)
        and math.isfinite(saved_at)
        and isinstance(files, dict)
        and all(FILE_NAME.fullmatch(name) and isinstance(file.get("bytes"), int) for name, file in files.items())
        and STATE in files
        and isinstance(tensors, dict)
    )


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        data = file.read_bytes()
        return data, json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
