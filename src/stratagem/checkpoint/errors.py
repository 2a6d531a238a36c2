"""Errors shared by all checkpoint formats."""

from __future__ import annotations

from pathlib import Path

from stratagem.errors import CheckpointError

__all__ = ["save_error"]


def save_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a failed save, including the storage layer's notes on bytes written and free space."""
    notes = " ".join(getattr(error, "__notes__", ()))
    return CheckpointError(f"{path}: the checkpoint could not be written: {error}. {notes}".rstrip())
