"""Find the checkpoint from which a run goes on."""

from __future__ import annotations

import os
from pathlib import Path

from stratagem.checkpoint.directory import MANIFEST, read_manifest
from stratagem.errors import CheckpointError

__all__ = ["find_latest_checkpoint"]


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in ``folder`` that was completed last, or None where there is none.

    A checkpoint appears under its name only when it is complete, so what a killed save left is never found. Single
    files count where they are named ``epoch_<n>.pth`` or ``iter_<n>.pth``.
    """
    found: list[tuple[float, Path]] = []
    for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and (entry / MANIFEST).is_file():
            try:
                found.append((float(read_manifest(entry)["saved_at"]), entry))
            except (CheckpointError, KeyError, TypeError, ValueError):
                # Not ours, or damaged: an older one may still serve. Asked for by name, it is an error.
                continue
        elif entry.suffix == ".pth" and entry.stem.rpartition("_")[0] in {"epoch", "iter"}:
            found.append((entry.stat().st_mtime, entry))
    return max(found)[1] if found else None
