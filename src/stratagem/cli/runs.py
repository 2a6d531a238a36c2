"""``stratagem runs ls`` and ``show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.errors import CheckpointNotFoundError
from stratagem.train.run.run_history import RECORD, RunHistory, Session, read_record
from stratagem.utils import is_url, mask_text

__all__ = ["list_starts", "show_lineage"]


def list_starts(folder: Path) -> None:
    """Print a table of the sessions in the folder of a run, or in the folders of several."""
    records = sorted([*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")])
    if not records:
        raise CheckpointNotFoundError(f"{folder}: no run was started in it, nor in the folders in it.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("start", "went on from", "began at", "ended at", "how it ended", "changes"):
        table.add_column(heading, overflow="fold")
    for record in records:
        history, outcome = read_record(record.parent)
        session = history.sessions[-1]
        before = "" if session.checkpoint is None else Path(session.checkpoint).name
        if len(history.sessions) > 1:
            before += f" of {history.sessions[-2].name}"
        reached = "" if outcome is None else _place(outcome.epoch, outcome.iter)
        how = "killed, or still running" if outcome is None else mask_text(outcome.how)
        began = _place(session.epoch, session.iter)
        table.add_row(session.name, before, began, reached, how, str(len(session.changes) or ""))
    Console(markup=False, highlight=False).print(table)


def show_lineage(place: str) -> None:
    """Print the sessions that led to a checkpoint, or to the session whose folder it is."""
    if not is_url(place) and (Path(place) / RECORD).is_file():
        history, outcome = read_record(Path(place))
    else:
        with open_checkpoint(place if is_url(place) else Path(place)) as tree:
            meta = tree.get("meta")
            history, outcome = RunHistory.from_meta(meta if isinstance(meta, Mapping) else {}), None
    if not history.sessions:
        raise CheckpointNotFoundError(
            f"{mask_text(place)} does not say which starts led to it: it was not saved by a run of `stratagem train`."
        )
    for session in history.sessions:
        _tell(session)
    if outcome is not None:
        typer.echo(f"  {mask_text(outcome.how)}, at {_place(outcome.epoch, outcome.iter)}, {outcome.at}")


def _tell(session: Session) -> None:
    ranks = "1 rank" if session.world_size == 1 else f"{session.world_size} ranks"
    typer.echo(f"{session.name}  {session.strategy}, {ranks}, stratagem {session.stratagem}")
    if session.checkpoint is None:
        typer.echo("  began anew")
    else:
        typer.echo(f"  went on from {mask_text(session.checkpoint)}, at {_place(session.epoch, session.iter)}")
    for change in session.changes:
        typer.echo(f"  changed: {mask_text(change)}")


def _place(epoch: int, iteration: int) -> str:
    return f"epoch {epoch}, iteration {iteration}"
