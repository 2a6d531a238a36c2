"""List the removable checkpoints in a folder, grouped by the run that saved them, for retention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.checkpoint.catalog.inspection import CheckpointInfo, inspect_checkpoint
from stratagem.checkpoint.catalog.order import SaveOrder, oldest_first
from stratagem.checkpoint.catalog.retention_tag import RetentionTag
from stratagem.checkpoint.directory.manifest import MANIFEST

__all__ = ["SavedCheckpoint", "checkpoints_of_run", "checkpoints_by_run"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that a run saved; ``finite`` is False if its weights contain NaN or Inf."""

    path: Path
    saved_at: float
    iter: int
    retention_tag: RetentionTag
    finite: bool = True
    order: SaveOrder | None = None


def checkpoints_of_run(run_id: str, folder: Path) -> list[SavedCheckpoint]:
    """Return the checkpoints of one run in a folder, oldest first; see :func:`checkpoints_by_run`."""
    return checkpoints_by_run(folder).get(run_id, [])


def checkpoints_by_run(folder: Path) -> dict[str, list[SavedCheckpoint]]:
    """Return the checkpoints in a folder, keyed by run ID, oldest first.

    Unreadable checkpoints are omitted. See :func:`~stratagem.checkpoint.catalog.order.oldest_first` for the order.
    """
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.is_dir() else []
    found = [each for entry in entries if (each := inspect_checkpoint(entry)) is not None and _can_be_removed(each)]
    by_run: dict[str, list[SavedCheckpoint]] = {}
    for each in oldest_first(found):
        if each.run_id is not None:
            saved = SavedCheckpoint(
                path=each.path,
                saved_at=each.saved_at,
                iter=each.position.get("iter", 0),
                retention_tag=each.retention_tag,
                finite=each.finite,
                order=each.order,
            )
            by_run.setdefault(each.run_id, []).append(saved)
    return by_run


def _can_be_removed(info: CheckpointInfo) -> bool:
    # A folder in DeepSpeed's format has no manifest, so the files that belong to it are unknown.
    return not info.path.is_dir() or (info.path / MANIFEST).is_file()
