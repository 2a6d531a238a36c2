"""Implement ``stratagem ckpt prune``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.filesize import decimal

from stratagem.checkpoint import Retention, SavedCheckpoint, checkpoints_by_run, format_for, remove_checkpoints
from stratagem.cli.output import echo, status
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from stratagem.storage import tree_bytes
from stratagem.train.run.context import INTERRUPTED
from stratagem.train.run.work_dir_lock import work_dir_lock

__all__ = ["prune"]


def prune(folder: Path, *, keep_last: int, keep_best: int, keep_every: int | None, ask: bool, dry_run: bool) -> None:
    """Print the checkpoints in a folder that the retention options do not keep, and remove them.

    Args:
        folder: the folder of one or more runs.
        keep_last: the number of latest checkpoints to keep per run.
        keep_best: the number of best checkpoints to keep per metric.
        keep_every: keep checkpoints whose number is a multiple of this.
        ask: whether to ask for confirmation.
        dry_run: whether to only print the checkpoints.

    Raises:
        CheckpointNotFoundError: if the folder contains no checkpoint of a run.
        WorkDirError: if a training run is using the folder.
    """
    runs = checkpoints_by_run(folder)
    if not runs:
        raise CheckpointNotFoundError(f"No checkpoint of a run found in {folder}.")
    logger = logging.getLogger("stratagem.cli")
    with work_dir_lock(folder, logger):
        removable = [
            each
            for saved in runs.values()
            for each in _select_removable(saved, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        ]
        if not removable:
            echo("There are no checkpoints to remove.")
            return
        total = 0
        for each in removable:
            size = tree_bytes(each.path)
            total += size
            echo(f"{each.path}  {decimal(size)}")
        if dry_run:
            echo(f"Would remove {len(removable)} checkpoints ({decimal(total)}).")
        elif not ask or typer.confirm(f"Remove these {len(removable)} checkpoints ({decimal(total)})?"):
            remove_checkpoints([each.path for each in removable], logger)
            echo(f"Removed {sum(not each.path.exists() for each in removable)} checkpoints.")


def _select_removable(
    saved: Sequence[SavedCheckpoint], *, keep_last: int, keep_best: int, keep_every: int | None
) -> list[SavedCheckpoint]:
    # Put the checkpoints of interrupted runs last, because `keep_every` applies only to the first group.
    groups = sorted(
        {each.retention_tag.group for each in saved if each.retention_tag.group}, key=lambda name: name == INTERRUPTED
    )
    retention = Retention(groups=groups, last=keep_last, every=keep_every, best=keep_best)
    return retention.select_removable(_with_damaged_marked(saved, keep_last))


def _with_damaged_marked(saved: Sequence[SavedCheckpoint], keep_last: int) -> list[SavedCheckpoint]:
    """Verify checkpoints, latest first, until ``keep_last`` are intact; return all, with damaged ones marked as unusable."""
    marked: list[SavedCheckpoint] = []
    intact = 0
    with status("Reading the checkpoints that would be kept ..."):
        for each in reversed(saved):
            if intact < keep_last and each.finite and not each.retention_tag.metric:
                try:
                    format_for(each.path).verify(each.path)
                    intact += 1
                except CheckpointError as error:
                    echo(f"{each.path} is damaged and does not count as kept: {error}", err=True)
                    each = replace(each, finite=False)  # noqa: PLW2901 -- the same checkpoint, marked unusable
            marked.append(each)
    return marked[::-1]
