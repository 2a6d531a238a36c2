"""Find the checkpoint from which a run goes on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stratagem.checkpoint.manifest import MANIFEST, read_manifest
from stratagem.errors import CheckpointError

__all__ = ["find_latest_checkpoint"]

_NUMBERED = re.compile(r"(epoch|iter)_(?P<number>[0-9]+)(\.pth)?")


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in ``folder`` that was completed last, or None where there is none.

    A checkpoint appears under its name only when it is complete, so what a killed save left is never found. Single
    files count where they are named ``epoch_<n>.pth`` or ``iter_<n>.pth``.
    """
    found: list[tuple[float, int, Path]] = []
    for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if entry.name.startswith("."):
            continue
        numbered = _NUMBERED.fullmatch(entry.name)
        # The clock of a file system ticks seldom: of files made at once the number tells the later.
        number = int(numbered["number"]) if numbered else 0
        if (entry / MANIFEST).is_file():
            try:
                found.append((read_manifest(entry)["saved_at"], number, entry))
            except CheckpointError:
                # Not ours, or damaged: an older one may still serve. Asked for by name, it is an error.
                continue
        elif numbered and entry.suffix == ".pth" and entry.is_file():
            found.append((entry.stat().st_mtime, number, entry))
    return max(found)[-1] if found else None
