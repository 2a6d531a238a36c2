"""Implement ``stratagem ckpt ls`` and ``stratagem ckpt verify``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stratagem.checkpoint import CheckpointInfo, format_for
from stratagem.checkpoint import list_checkpoints as list_in
from stratagem.cli.output import Table, echo, print_json, print_table
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from stratagem.logging.console import shared_console
from stratagem.storage import tree_bytes

__all__ = ["list_checkpoints", "verify"]


def list_checkpoints(folder: Path, *, as_json: bool = False) -> None:
    """Print a table of the checkpoints in a folder and its subfolders.

    Raises:
        CheckpointNotFoundError: if there are none.
    """
    found = list(_checkpoints_under(folder))
    if not found:
        raise CheckpointNotFoundError(f"No checkpoint found in {folder} or its subfolders.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("checkpoint", "epoch", "iter", "saved", "size", "state"):
        numeric = heading in ("epoch", "iter", "size")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for candidate in found:
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(candidate.saved_at))
        inside = candidate.path.is_relative_to(folder)
        name = candidate.path.relative_to(folder) if inside else candidate.path
        epoch, iteration = (str(candidate.position.get(key, "")) for key in ("epoch", "iter"))
        size = decimal(tree_bytes(candidate.path))
        table.add_row(str(name), epoch, iteration, saved, size, candidate.fault or "complete")
    print_table(table, as_json=as_json)


def verify(paths: Sequence[Path], *, as_json: bool = False) -> None:
    """Read checkpoints completely and print whether each is intact, as JSON if requested.

    Raises:
        CheckpointNotFoundError: if a path does not exist.
        typer.Exit: with status 1, if a checkpoint is damaged.
    """
    checkpoints = [each for path in paths for each in _checkpoints_at(path)]
    damaged = 0
    rows: list[dict[str, object]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=shared_console(), transient=True) as progress:
        task = progress.add_task("verifying", total=len(checkpoints))
        for path in checkpoints:
            begin = time.perf_counter()
            try:
                size = format_for(path).verify(path)
            except CheckpointError as error:
                damaged += 1
                rows.append({"checkpoint": str(path), "intact": False, "fault": str(error)})
                if not as_json:
                    echo(f"DAMAGED  {path}\n         {error}")
            else:
                rows.append({"checkpoint": str(path), "intact": True, "bytes": size})
                if not as_json:
                    echo(f"ok       {path}  ({decimal(size)}, {time.perf_counter() - begin:.1f} s)")
            progress.advance(task)
    if as_json:
        print_json(rows)
    if damaged:
        echo(f"{damaged} of {len(checkpoints)} checkpoints are damaged.", err=True)
        raise typer.Exit(1)


def _checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints in a folder, or the path itself if it is a checkpoint."""
    if not path.exists():
        raise CheckpointNotFoundError(f"Checkpoint not found: {path}")
    inside = [candidate.path for candidate in _checkpoints_under(path)] if path.is_dir() else []
    return inside or [path]


def _checkpoints_under(folder: Path) -> Iterator[CheckpointInfo]:
    yield from list_in(folder)
    for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
        if inner.is_dir() and not inner.name.startswith("."):
            yield from list_in(inner)
