"""Implement ``stratagem runs ls`` and ``stratagem runs show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.cli.output import Table, echo
from stratagem.errors import CheckpointNotFoundError
from stratagem.train.run.run_history import RECORD, RunHistory, Session, read_record
from stratagem.utils import is_url, mask_text

__all__ = ["list_sessions", "show_sessions"]


def list_sessions(folder: Path) -> None:
    """Print a table of all sessions of the runs in a folder.

    Args:
        folder: the folder of a run, or a folder that contains several of them.

    Raises:
        CheckpointNotFoundError: if there are no sessions.
    """
    records = sorted([*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")])
    if not records:
        raise CheckpointNotFoundError(f"No run found in {folder} or its subfolders.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("session", "resumed from", "started at", "ended at", "outcome", "changes"):
        table.add_column(heading, overflow="fold")
    for record in records:
        history, outcome = read_record(record.parent)
        session = history.sessions[-1]
        source = "" if session.checkpoint is None else Path(session.checkpoint).name
        if len(history.sessions) > 1:
            source += f" of {history.sessions[-2].name}"
        reached = "" if outcome is None else _position(outcome.epoch, outcome.iter)
        how = "killed or still running" if outcome is None else mask_text(outcome.how)
        began = _position(session.epoch, session.iter)
        table.add_row(session.name, source, began, reached, how, str(len(session.changes) or ""))
    Console(markup=False, highlight=False).print(table)


def show_sessions(path: str) -> None:
    """Print the sessions that led to a checkpoint or to a session.

    Args:
        path: a checkpoint, or the folder of a session.

    Raises:
        CheckpointNotFoundError: if the checkpoint has no history.
    """
    if not is_url(path) and (Path(path) / RECORD).is_file():
        history, outcome = read_record(Path(path))
    else:
        with open_checkpoint(path if is_url(path) else Path(path)) as tree:
            meta = tree.get("meta")
            history, outcome = RunHistory.from_meta(meta if isinstance(meta, Mapping) else {}), None
    if not history.sessions:
        raise CheckpointNotFoundError(
            f"{mask_text(path)} has no history of sessions: it was not saved by a run of `stratagem train`."
        )
    for session in history.sessions:
        _print_session(session)
    if outcome is not None:
        echo(f"  {mask_text(outcome.how)} at {_position(outcome.epoch, outcome.iter)}, {outcome.at}")


def _print_session(session: Session) -> None:
    ranks = "1 rank" if session.world_size == 1 else f"{session.world_size} ranks"
    echo(f"{session.name}  {session.strategy}, {ranks}, stratagem {session.stratagem}")
    if session.checkpoint is None:
        echo("  started from scratch")
    else:
        echo(f"  resumed from {mask_text(session.checkpoint)} at {_position(session.epoch, session.iter)}")
    for change in session.changes:
        echo(f"  changed: {mask_text(change)}")


def _position(epoch: int, iteration: int) -> str:
    return f"epoch {epoch}, iteration {iteration}"
