"""Files in a checkpoint directory that are not ours: an engine's own form, which goes with what it cannot say.

They are written aside, published and removed together with the rest, and the manifest has the digest of each.
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
# A path below the directory, of plain names alone.
_PATH = re.compile(r"[^./\\:\x00][^/\\:\x00]*(/[^./\\:\x00][^/\\:\x00]*)*")


def describe_extra_files(folder: Path, ours: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of every file in a folder but ours: its size and digest, by its path there."""
    described = {}
    for where, _, names in os.walk(folder):
        for name in names:
            file = Path(where, name)
            path = file.relative_to(folder).as_posix()
            if path not in ours:
                described[path] = {"bytes": file.stat().st_size, "digest": _digest_of_file(file)}
    return dict(sorted(described.items()))


def are_extra_files_valid(said: Any) -> bool:
    """Tell whether what a manifest says of such files has the form that it needs, and leads nowhere else."""
    return isinstance(said, Mapping) and all(
        _PATH.fullmatch(path)
        and isinstance(file, Mapping)
        and type(file.get("bytes")) is int
        and isinstance(file.get("digest"), str)
        for path, file in said.items()
    )


def verify_extra_files(folder: Path, said: Mapping[str, Any], share: slice) -> int:
    """Compare a share of such files with what the manifest says, and the size of all; return how many bytes there are.

    Raises:
        CheckpointDamagedError: if one is missing, cut off or changed.
    """
    for number, (path, file) in enumerate(said.items()):
        here = folder / path
        if not here.is_file():
            raise CheckpointDamagedError(f"{here} is missing; the checkpoint is not complete.")
        actual = here.stat().st_size
        if actual != file["bytes"]:
            raise CheckpointDamagedError(
                f"{here} has {actual} bytes, but {file['bytes']} were written: it was cut off or changed."
            )
        if number in range(*share.indices(len(said))) and _digest_of_file(here) != file["digest"]:
            raise CheckpointDamagedError(f"{here} is not what was written: its digest differs.")
    return sum(file["bytes"] for file in said.values())


def top_level_names(said: Mapping[str, Any]) -> set[str]:
    """Return the names in the directory itself that such files have or lie below."""
    return {path.partition("/")[0] for path in said}


def _digest_of_file(file: Path) -> str:
    digest = Digest()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.text()
