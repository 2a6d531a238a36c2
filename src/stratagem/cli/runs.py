"""``stratagem runs ls`` and ``show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from stratagem.checkpoint.convert.convert import opened_checkpoint
from stratagem.errors import CheckpointNotFoundError
from stratagem.train.run.run_history import RECORD, Lineage, Start, read_record
from stratagem.utils import is_url, mask_text

__all__ = ["list_starts", "show_lineage"]


def list_starts(folder: Path) -> None:
    """Print a table of the starts in the folder of a run, or in the folders of several."""
    records = sorted([*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")])
    if not records:
        raise CheckpointNotFoundError(f"{folder}: no run was started in it, nor in the folders in it.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("start", "went on from", "began at", "ended at", "how it ended", "changes"):
        table.add_column(heading, overflow="fold")
    for record in records:
        lineage, ending = read_record(record.parent)
        start = lineage.starts[-1]
        before = "" if start.checkpoint is None else Path(start.checkpoint).name
        if len(lineage.starts) > 1:
            before += f" of {lineage.starts[-2].name}"
        reached = "" if ending is None else _place(ending.epoch, ending.iter)
        how = "killed, or still running" if ending is None else mask_text(ending.how)
        began = _place(start.epoch, start.iter)
        table.add_row(start.name, before, began, reached, how, str(len(start.changes) or ""))
    Console(markup=False, highlight=False).print(table)


def show_lineage(place: str) -> None:
    """Print the starts that led to a checkpoint, or to the start whose folder it is."""
    if not is_url(place) and (Path(place) / RECORD).is_file():
        lineage, ending = read_record(Path(place))
    else:
        with opened_checkpoint(place if is_url(place) else Path(place)) as tree:
            meta = tree.get("meta")
            lineage, ending = Lineage.of_checkpoint(meta if isinstance(meta, Mapping) else {}), None
    if not lineage.starts:
        raise CheckpointNotFoundError(
            f"{mask_text(place)} does not say which starts led to it: it was not saved by a run of `stratagem train`."
        )
    for start in lineage.starts:
        _tell(start)
    if ending is not None:
        typer.echo(f"  {mask_text(ending.how)}, at {_place(ending.epoch, ending.iter)}, {ending.at}")


def _tell(start: Start) -> None:
    ranks = "1 rank" if start.world_size == 1 else f"{start.world_size} ranks"
    typer.echo(f"{start.name}  {start.strategy}, {ranks}, stratagem {start.stratagem}")
    if start.checkpoint is None:
        typer.echo("  began anew")
    else:
        typer.echo(f"  went on from {mask_text(start.checkpoint)}, at {_place(start.epoch, start.iter)}")
    for change in start.changes:
        typer.echo(f"  changed: {mask_text(change)}")


def _place(epoch: int, iteration: int) -> str:
    return f"epoch {epoch}, iteration {iteration}"
