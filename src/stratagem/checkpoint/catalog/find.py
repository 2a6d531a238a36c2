"""Find the checkpoints of a run, and record where they are saved."""

from __future__ import annotations

import os
from pathlib import Path

from stratagem.checkpoint.catalog.inspection import CheckpointInfo
from stratagem.checkpoint.catalog.order import oldest_first
from stratagem.checkpoint.catalog.scan import inspect_folder
from stratagem.storage import read_bytes, write_atomic

__all__ = [
    "POINTER",
    "find_latest_checkpoint",
    "list_checkpoints",
    "record_checkpoint_folder",
    "update_last_checkpoint",
]

POINTER = "last_checkpoint"
# A file in each session's log directory with one absolute path per line.
_FOLDERS = "checkpoint_folders"


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint in ``folder``, or None if there is none.

    A checkpoint gets its name only when it is complete, so an interrupted save is never found. Directories and single
    files that were saved by a run or a strategy are found regardless of their names. Checkpoints with NaN or Inf in
    their weights are skipped. Tensors are not read or verified here. See :func:`list_checkpoints` for the order.
    """
    return next((found.path for found in list_checkpoints(folder) if not found.fault), None)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Return the checkpoints in ``folder``, newest first, including unusable ones, whose ``fault`` contains the reason.

    The checkpoints of a run are ordered by session and save number, regardless of the clock and the iteration.
    Different runs are ordered by time. If the run also saves to other folders, their checkpoints are included.
    """
    own = Path(folder)
    folders = dict.fromkeys([own, *_recorded_folders(own)])
    return oldest_first(found for each in folders for found in inspect_folder(each))[::-1]


def update_last_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the path of ``checkpoint`` to ``folder/last_checkpoint``, or only its name if it is in ``folder``.

    Raises:
        OSError: if the file cannot be written; its contents are then unchanged.
    """
    name = checkpoint.name if checkpoint.parent == folder else str(checkpoint)
    write_atomic(folder / POINTER, f"{name}\n")


def record_checkpoint_folder(folder: Path, session_folder: Path) -> None:
    """Record in ``session_folder`` that the run also saves to ``folder``, so that :func:`list_checkpoints` finds them.

    Raises:
        OSError: if the file cannot be written.
    """
    noted = dict.fromkeys([*_lines(session_folder / _FOLDERS), str(folder)])
    write_atomic(session_folder / _FOLDERS, "".join(f"{line}\n" for line in noted))


def _recorded_folders(folder: Path) -> list[Path]:
    """Return other folders that may hold the run's checkpoints, as recorded by its sessions and ``last_checkpoint``."""
    recorded = [line for file in sorted(folder.glob(f"*/{_FOLDERS}")) for line in _lines(file)]
    named = _lines(folder / POINTER)[:1]
    return [*map(Path, recorded), *((folder / name).parent for name in named)]


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in read_bytes(file).decode().splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
