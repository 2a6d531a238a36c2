"""List the removable checkpoints in a folder, grouped by the run that saved them, for retention."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from stratagem.checkpoint.catalog.inspection import SavedCheckpoint
from stratagem.checkpoint.catalog.order import oldest_first, sort_one_run
from stratagem.checkpoint.catalog.scan import inspect_folder

__all__ = ["SavedCheckpoint", "checkpoints_of_run", "checkpoints_by_run"]


def checkpoints_of_run(run_id: str, folder: Path, *, look_up: Collection[Path] | None = None) -> list[SavedCheckpoint]:
    """Return the checkpoints of one run in a folder, oldest first; see :func:`checkpoints_by_run`.

    With ``look_up``, the metadata of other checkpoints that were read before may be out of date.
    """
    found = [each for each in inspect_folder(folder, look_up) if each.run_id == run_id and each.is_removable]
    return [each.saved for each in sort_one_run(found)]


def checkpoints_by_run(folder: Path) -> dict[str, list[SavedCheckpoint]]:
    """Return the checkpoints in a folder, keyed by run ID, oldest first.

    Unreadable checkpoints are omitted. See :func:`~stratagem.checkpoint.catalog.order.oldest_first` for the order.
    """
    found = [each for each in inspect_folder(folder) if each.is_removable]
    by_run: dict[str, list[SavedCheckpoint]] = {}
    for each in oldest_first(found):
        if each.run_id is not None:
            by_run.setdefault(each.run_id, []).append(each.saved)
    return by_run
