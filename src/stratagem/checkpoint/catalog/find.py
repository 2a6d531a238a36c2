"""Find the checkpoint from which a run resumes."""

from __future__ import annotations

import os
from pathlib import Path

from stratagem.checkpoint.catalog.inspection import Candidate, inspect_checkpoint
from stratagem.checkpoint.catalog.order import oldest_first
from stratagem.checkpoint.catalog.pointer import noted_folders

__all__ = ["find_latest_checkpoint", "list_checkpoints"]


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of ``folder``, or None if there is none.

    A checkpoint gets its name only when it is complete, so what a killed save left is never found. Its tensors are not
    read: loading it does that. Folders and single files count whatever their name, if a run or a strategy saved them. One
    whose weights are not all finite is skipped. Which is newer: :func:`list_checkpoints`.
    """
    return next((found.path for found in list_checkpoints(folder) if not found.fault), None)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Candidate]:
    """Return the checkpoints of ``folder``, the newest first, with the faults of those that cannot be used.

    Within a run the newest is the one that was saved last, by session and save, whatever the clock and the iteration say.
    The clock decides between runs. If the run saves to other folders too, the checkpoints in those are included.
    """
    own = Path(folder)
    folders = dict.fromkeys([own, *noted_folders(own)])
    entries = [entry for each in folders if each.is_dir() for entry in each.iterdir()]
    found = (inspect_checkpoint(entry) for entry in entries if not entry.name.startswith("."))
    return oldest_first(each for each in found if each is not None)[::-1]
