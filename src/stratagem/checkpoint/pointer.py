"""The small file in a run's folder that names the checkpoint saved last, for people and their scripts."""

from __future__ import annotations

from pathlib import Path

from stratagem.storage import write_atomic

__all__ = ["POINTER", "point_to", "pointed_at"]

POINTER = "last_checkpoint"


def point_to(checkpoint: Path, folder: Path) -> None:
    """Have ``last_checkpoint`` in a folder name a checkpoint: by its name alone where it lies in the folder.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    name = checkpoint.name if checkpoint.parent == folder else str(checkpoint)
    write_atomic(folder / POINTER, f"{name}\n")


def pointed_at(folder: Path) -> Path | None:
    """Return what ``last_checkpoint`` in a folder names, be it there or not; None where there is no such file."""
    try:
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return folder / name if name else None
