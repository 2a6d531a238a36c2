"""Small files that name the checkpoint a run saved last, and the folders it saves to beside its own."""

from __future__ import annotations

from pathlib import Path

from stratagem.storage import write_atomic

__all__ = ["POINTER", "note_folder", "noted_folders", "point_to"]

POINTER = "last_checkpoint"
# In the folder of each start of the run: an absolute path a line.
_FOLDERS = "checkpoint_folders"


def point_to(checkpoint: Path, folder: Path) -> None:
    """Have ``last_checkpoint`` in a folder name a checkpoint: by its name alone if it is in the folder.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    name = checkpoint.name if checkpoint.parent == folder else str(checkpoint)
    write_atomic(folder / POINTER, f"{name}\n")


def note_folder(other: Path, start_folder: Path) -> None:
    """Record in the folder of a start of a run that it saves to another folder, so that its checkpoints there are found.

    Raises:
        OSError: if it cannot be written.
    """
    noted = dict.fromkeys([*_lines(start_folder / _FOLDERS), str(other)])
    write_atomic(start_folder / _FOLDERS, "".join(f"{line}\n" for line in noted))


def noted_folders(folder: Path) -> list[Path]:
    """Return the folders that may hold a run's checkpoints beside its own: those its starts recorded, and the pointer's."""
    recorded = [line for file in sorted(folder.glob(f"*/{_FOLDERS}")) for line in _lines(file)]
    named = _lines(folder / POINTER)[:1]
    return [*map(Path, recorded), *((folder / name).parent for name in named)]


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
