"""``stratagem ckpt prune``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.filesize import decimal

from stratagem.checkpoint import Retention, SavedCheckpoint, checkpoints_by_run, format_for, remove_checkpoints
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from stratagem.logging.console import shared_console
from stratagem.storage import tree_bytes
from stratagem.train.run.context import INTERRUPTED
from stratagem.train.run.work_dir_lock import work_dir_lock

__all__ = ["prune"]


def prune(folder: Path, *, keep_last: int, keep_best: int, keep_every: int | None, ask: bool, dry_run: bool) -> None:
    """Remove what is not to be kept of each run's checkpoints in a folder, after it was named.

    Raises:
        CheckpointNotFoundError: if no run saved a checkpoint there.
        WorkDirError: if a training has the folder.
    """
    runs = checkpoints_by_run(folder)
    if not runs:
        raise CheckpointNotFoundError(f"{folder}: no run has saved a checkpoint in it.")
    logger = logging.getLogger("stratagem.cli")
    with work_dir_lock(folder, logger):
        superfluous = [
            each
            for saved in runs.values()
            for each in _superfluous(saved, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        ]
        if not superfluous:
            typer.echo("Nothing is to be removed.")
            return
        total = 0
        for each in superfluous:
            size = tree_bytes(each.path)
            total += size
            typer.echo(f"{each.path}  {decimal(size)}")
        if dry_run:
            typer.echo(f"{len(superfluous)} would be removed, {decimal(total)}.")
        elif not ask or typer.confirm(f"Remove these {len(superfluous)}, {decimal(total)}?"):
            remove_checkpoints([each.path for each in superfluous], logger)
            typer.echo(f"Removed {sum(not each.path.exists() for each in superfluous)}.")


def _superfluous(
    saved: Sequence[SavedCheckpoint], *, keep_last: int, keep_best: int, keep_every: int | None
) -> list[SavedCheckpoint]:
    # What an interruption saved is counted with the others, and has no numbers of its own to keep for good.
    series = sorted(
        {each.retention_tag.group for each in saved if each.retention_tag.group}, key=lambda name: name == INTERRUPTED
    )
    retention = Retention(groups=series, last=keep_last, every=keep_every, best=keep_best)
    return retention.select_removable(_with_damage_told(saved, keep_last))


def _with_damage_told(saved: Sequence[SavedCheckpoint], keep_last: int) -> list[SavedCheckpoint]:
    """Read the last ones until so many are sound; those that are damaged count as unusable."""
    told: list[SavedCheckpoint] = []
    sound = 0
    with shared_console().status("Reading the checkpoints that would be kept ..."):
        for each in reversed(saved):
            if sound < keep_last and each.finite and not each.retention_tag.metric:
                try:
                    format_for(each.path).verify(each.path)
                    sound += 1
                except CheckpointError as error:
                    typer.echo(f"{each.path} is damaged and does not count: {error}", err=True)
                    each = replace(each, finite=False)  # noqa: PLW2901 -- the same checkpoint, better known
            told.append(each)
    return told[::-1]
