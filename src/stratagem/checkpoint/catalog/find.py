"""Find the checkpoints of a run, and record where they are saved."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from stratagem.checkpoint.catalog.inspection import CheckpointInfo
from stratagem.checkpoint.catalog.order import oldest_first
from stratagem.checkpoint.catalog.scan import inspect_folder
from stratagem.errors import ConfigValueError
from stratagem.storage import read_bytes, write_atomic
from stratagem.utils import did_you_mean

__all__ = [
    "POINTER",
    "best_checkpoints",
    "find_best_checkpoint",
    "find_latest_checkpoint",
    "list_checkpoints",
    "record_checkpoint_folder",
    "resumable_first",
    "update_last_checkpoint",
]

POINTER = "last_checkpoint"
# A file in each session's log directory with one absolute path per line.
_FOLDERS = "checkpoint_folders"


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint in ``folder``, or None if there is none.

    A checkpoint gets its name only when it is complete, so an interrupted save is never found. Directories and single
    files that were saved by a run or a strategy are found regardless of their names. Checkpoints with NaN or Inf in
    their weights are skipped. Checkpoints that the MMEngine layer saved without the optimizer are returned only if all others are
    unusable. Tensors are not read or verified here. See :func:`list_checkpoints` for the order.
    """
    usable = [found for found in list_checkpoints(folder) if not found.fault]
    return next((found.path for found in resumable_first(usable)), None)


def resumable_first(found: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    """Return checkpoints in the same order, except that those saved without the optimizer are last."""
    return sorted(found, key=lambda each: each.is_weights_only)


def find_best_checkpoint(
    folder: str | os.PathLike[str], metric: str | None = None, *, run_id: str | None = None
) -> Path | None:
    """Return the checkpoint in ``folder`` with the best value of a metric in ``save_best``, or None if there is none.

    Args:
        folder: the work directory of a run.
        metric: the name of the metric; it can be omitted if there are checkpoints for only one.
        run_id: the ID of a run, to consider only its checkpoints.

    Raises:
        ConfigValueError: if ``metric`` is None and there are checkpoints for several metrics, or none is for ``metric``.
    """
    best = best_checkpoints(folder, run_id=run_id)
    if not best:
        return None
    if metric is None and len(best) > 1:
        raise ConfigValueError(f"There are best checkpoints for several metrics. Specify one of {', '.join(best)}.")
    wanted = next(iter(best)) if metric is None else metric
    if wanted not in best:
        raise ConfigValueError(f"There is no best checkpoint for the metric {wanted!r}. {did_you_mean(wanted, best)}")
    return best[wanted].path


def best_checkpoints(folder: str | os.PathLike[str], *, run_id: str | None = None) -> dict[str, CheckpointInfo]:
    """Return the best usable checkpoint in ``folder`` for each metric in ``save_best``; see :func:`find_best_checkpoint`."""
    best: dict[str, CheckpointInfo] = {}
    # Of two equal scores, the earlier one ranks first.
    for found in reversed(list_checkpoints(folder)):
        tag = found.retention_tag
        if not tag.metric or found.fault or (run_id is not None and found.run_id != run_id):
            continue
        if tag.metric not in best or tag.is_better_than(best[tag.metric].retention_tag):
            best[tag.metric] = found
    return best


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
