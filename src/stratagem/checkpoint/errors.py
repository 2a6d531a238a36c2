"""The errors that every form of checkpoint shares."""

from __future__ import annotations

from pathlib import Path

from stratagem.errors import CheckpointError

__all__ = ["save_error"]


def save_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a save that failed, with what the storage layer noted: how much was written, what is free."""
    notes = " ".join(getattr(error, "__notes__", ()))
    return CheckpointError(f"{path}: the checkpoint could not be written: {error}. {notes}".rstrip())
