"""What a checkpoint directory says of itself: its form, its files, and where its run stood."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.tree import StateTree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = ["FILE_NAME", "MANIFEST", "STATE", "make_manifest", "read_manifest", "refuse_foreign"]

MANIFEST = "manifest.json"
STATE = "state.json"
# What is a file's name on every system, and stays inside of the directory.
FILE_NAME = re.compile(r"[^./\\:\x00][^/\\:\x00]*")
_FORMAT = "stratagem-checkpoint"
_VERSION = 1


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory: what it is, its files and where its run stood.

    Raises:
        CheckpointNotFoundError: if there is no such directory.
        CheckpointError: if it is not a checkpoint of ours, or of a later version.
        CheckpointDamagedError: if the manifest cannot be read.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    if not (path / MANIFEST).is_file():
        if (path / STATE).is_file():
            raise CheckpointDamagedError(f"{path / MANIFEST} is missing; the checkpoint is not complete.")
        raise CheckpointError(
            f"{path} is not a checkpoint of Stratagem: it has no {MANIFEST}. A checkpoint is a directory such as "
            "work_dirs/<name>/epoch_3, or a single .pth file."
        )
    manifest: dict[str, Any] = _read_json(path / MANIFEST)
    if not _is_ours(manifest):
        raise CheckpointError(f"{path / MANIFEST} belongs to another program; this is not a checkpoint of Stratagem.")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: the checkpoint has version {manifest.get('version')} of the format, this Stratagem reads version "
            f"{_VERSION}. Read it with the version that wrote it ({manifest.get('stratagem')})."
        )
    if not _is_complete(manifest):
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: it does not say what was written, or when.")
    return manifest


def make_manifest(tree: StateTree, sizes: Mapping[str, int], state: bytes) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files have these sizes, ``state`` being what :data:`STATE` holds."""
    meta = tree.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    position = {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "stratagem": meta.get("stratagem"),
        "saved_at": time.time(),
        "position": position,
        "files": dict(sizes),
        "state_sha256": hashlib.sha256(state).hexdigest(),
    }


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a folder that holds something else: all in it would be lost.

    Raises:
        CheckpointError: if it is not empty and no checkpoint of ours, sound or damaged.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        ours = _is_ours(_read_json(path / MANIFEST))
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
    saved_at, files = manifest.get("saved_at"), manifest.get("files")
    return (
        isinstance(saved_at, float)
        and math.isfinite(saved_at)
        and isinstance(files, dict)
        and all(FILE_NAME.fullmatch(name) and isinstance(size, int) for name, size in files.items())
        and STATE in files
        and isinstance(manifest.get("state_sha256"), str)
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
