"""Implement ``stratagem runs ls`` and ``stratagem runs show``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.cli.output import Table, echo, print_json, print_table
from stratagem.errors import CheckpointNotFoundError
from stratagem.train.goodput.account import Goodput, goodput_of
from stratagem.train.run.run_history import RECORD, RunHistory, Session, read_record
from stratagem.utils import is_url, mask_text

__all__ = ["list_sessions", "show_sessions"]


def list_sessions(folder: Path, *, as_json: bool = False) -> None:
    """Print a table of all sessions of the runs in a folder.

    Args:
        folder: the folder of a run, or a folder that contains several of them.
        as_json: whether to print JSON.

    Raises:
        CheckpointNotFoundError: if there are no sessions.
    """
    records = sorted([*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")])
    if not records:
        raise CheckpointNotFoundError(f"No run found in {folder} or its subfolders.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("session", "resumed from", "started at", "ended at", "outcome", "changes"):
        table.add_column(heading, overflow="fold")
    for record, successor in zip(records, _successors(records), strict=True):
        history, outcome = read_record(record.parent)
        session = history.sessions[-1]
        source = "" if session.checkpoint is None else Path(session.checkpoint).name
        if len(history.sessions) > 1:
            source += f" of {history.sessions[-2].name}"
        reached = "" if outcome is None else _position(outcome.epoch, outcome.iter)
        how = _without_outcome(successor) if outcome is None else mask_text(outcome.how)
        began = _position(session.epoch, session.iter)
        table.add_row(session.name, source, began, reached, how, str(len(session.changes) or ""))
    print_table(table, as_json=as_json)


def _successors(records: Sequence[Path]) -> list[Path | None]:
    """Return the record of the next session in the same work directory for each record."""
    following = [*records[1:], None]
    return [
        after if after is not None and after.parent.parent == record.parent.parent else None
        for record, after in zip(records, following, strict=True)
    ]


def _without_outcome(successor: Path | None) -> str:
    """Describe a session that recorded no outcome. Only one session at a time can hold the work directory."""
    if successor is None:
        return "killed or still running"
    return f"killed; {successor.parent.name} took over"


def show_sessions(path: str, *, as_json: bool = False) -> None:
    """Print the sessions that led to a checkpoint or to a session.

    Args:
        path: a checkpoint, or the folder of a session.
        as_json: whether to print JSON.

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
    goodput = _goodput(path, history.sessions[-1])
    if as_json:
        print_json(
            {
                "sessions": [asdict(session) for session in history.sessions],
                "outcome": None if outcome is None else {**asdict(outcome), "how": mask_text(outcome.how)},
                "goodput": None if goodput is None else goodput.record(),
            }
        )
        return
    for session in history.sessions:
        _print_session(session)
    if outcome is not None:
        echo(f"  {mask_text(outcome.how)} at {_position(outcome.epoch, outcome.iter)}, {outcome.at}")
    if goodput is not None:
        echo(goodput.describe())


def _goodput(path: str, session: Session) -> Goodput | None:
    """Return the goodput of the run up to a session, if the folder of the session is where the run wrote it."""
    if is_url(path):
        return None
    here = Path(path).absolute()
    work_dir = here.parent
    folder = here if (here / RECORD).is_file() else work_dir / Path(session.name).name
    return goodput_of(work_dir, folder)


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
