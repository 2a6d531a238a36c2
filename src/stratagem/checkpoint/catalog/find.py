"""Find the checkpoint from which a run resumes."""

from __future__ import annotations

import os
from pathlib import Path

from stratagem.checkpoint.catalog.inspection import CheckpointInfo, inspect_checkpoint
from stratagem.checkpoint.catalog.order import oldest_first
from stratagem.storage import write_atomic

__all__ = [
    "POINTER",
    "find_latest_checkpoint",
    "list_checkpoints",
    "record_checkpoint_folder",
    "update_last_checkpoint",
]

POINTER = "last_checkpoint"
# In the folder of each start of the run: an absolute path a line.
_FOLDERS = "checkpoint_folders"


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of ``folder``, or None if there is none.

    A checkpoint gets its name only when it is complete, so what a killed save left is never found. Its tensors are not
    read: loading it does that. Folders and single files count whatever their name, if a run or a strategy saved them. One
    whose weights are not all finite is skipped. Which is newer: :func:`list_checkpoints`.
    """
    return next((found.path for found in list_checkpoints(folder) if not found.fault), None)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Return the checkpoints of ``folder``, the newest first, with the faults of those that cannot be used.

    Within a run the newest is the one that was saved last, by session and save, whatever the clock and the iteration say.
    The clock decides between runs. If the run saves to other folders too, the checkpoints in those are included.
    """
    own = Path(folder)
    folders = dict.fromkeys([own, *_recorded_folders(own)])
    entries = [entry for each in folders if each.is_dir() for entry in each.iterdir()]
    found = (inspect_checkpoint(entry) for entry in entries if not entry.name.startswith("."))
    return oldest_first(each for each in found if each is not None)[::-1]


def update_last_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Have ``last_checkpoint`` in a folder name a checkpoint: by its name alone if it is in the folder.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    name = checkpoint.name if checkpoint.parent == folder else str(checkpoint)
    write_atomic(folder / POINTER, f"{name}\n")


def record_checkpoint_folder(other: Path, start_folder: Path) -> None:
    """Record in the folder of a start of a run that it saves to another folder, so that its checkpoints there are found.

    Raises:
        OSError: if it cannot be written.
    """
    noted = dict.fromkeys([*_lines(start_folder / _FOLDERS), str(other)])
    write_atomic(start_folder / _FOLDERS, "".join(f"{line}\n" for line in noted))


def _recorded_folders(folder: Path) -> list[Path]:
    """Return the folders that may hold a run's checkpoints beside its own: those its starts recorded, and the pointer's."""
    recorded = [line for file in sorted(folder.glob(f"*/{_FOLDERS}")) for line in _lines(file)]
    named = _lines(folder / POINTER)[:1]
    return [*map(Path, recorded), *((folder / name).parent for name in named)]


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
