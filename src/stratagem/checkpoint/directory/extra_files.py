"""Add files in another format, such as an engine's native one, to a checkpoint directory.

They are written, published and deleted together with the checkpoint, and the manifest records their digests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.directory.integrity import Digest
from stratagem.errors import CheckpointDamagedError

__all__ = ["verify_extra_files", "describe_extra_files", "are_extra_files_valid", "top_level_names"]

_CHUNK_BYTES = 1 << 22
# A relative path without ".", "..", hidden names or drive letters.
_PATH = re.compile(r"[^./\\:\x00][^/\\:\x00]*(/[^./\\:\x00][^/\\:\x00]*)*")


def describe_extra_files(folder: Path, known_files: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the manifest entries (path -> size and digest) of all files that are not in ``known_files``."""
    described = {}
    for where, _, names in os.walk(folder):
        for name in names:
            file = Path(where, name)
            path = file.relative_to(folder).as_posix()
            if path not in known_files:
                described[path] = {"bytes": file.stat().st_size, "digest": _digest_of_file(file)}
    return dict(sorted(described.items()))


def are_extra_files_valid(extra_files: Any) -> bool:
    """Return whether the entries of extra files in a manifest are valid and all paths are inside the directory."""
    return isinstance(extra_files, Mapping) and all(
        _PATH.fullmatch(path)
        and isinstance(file, Mapping)
        and type(file.get("bytes")) is int
        and isinstance(file.get("digest"), str)
        for path, file in extra_files.items()
    )


def verify_extra_files(folder: Path, extra_files: Mapping[str, Any], share: slice) -> int:
    """Check the sizes of all extra files and the digests of this rank's part of them; return the total number of bytes.

    Raises:
        CheckpointDamagedError: if a file is missing, truncated or modified.
    """
    for number, (path, file) in enumerate(extra_files.items()):
        actual_file = folder / path
        if not actual_file.is_file():
            raise CheckpointDamagedError(f"{actual_file} is missing; the checkpoint is incomplete.")
        actual = actual_file.stat().st_size
        if actual != file["bytes"]:
            raise CheckpointDamagedError(
                f"{actual_file} has {actual} bytes, but {file['bytes']} were written: it was truncated or modified."
            )
        if number in range(*share.indices(len(extra_files))) and _digest_of_file(actual_file) != file["digest"]:
            raise CheckpointDamagedError(f"{actual_file} is corrupted: its digest does not match the manifest.")
    return sum(file["bytes"] for file in extra_files.values())


def top_level_names(extra_files: Mapping[str, Any]) -> set[str]:
    """Return the first component of each path: the entries of the directory that belong to extra files."""
    return {path.partition("/")[0] for path in extra_files}


def _digest_of_file(file: Path) -> str:
    digest = Digest()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.text()
