"""The history of a run: its sessions, the checkpoint that each one resumed from, and its outcome."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from stratagem._version import __version__
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import read_bytes, write_record
from stratagem.utils import mask_text

__all__ = ["RECORD", "Outcome", "RunHistory", "Session", "read_record"]

# The name of the record file in the folder of each session.
RECORD = "start.json"
_KEY = "lineage"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One session of a run.

    Attributes:
        name: ``<work directory>/<timestamp>``, which is also the folder of its log.
        epoch: completed epochs at its start.
        iter: completed iterations at its start.
        checkpoint: the checkpoint that it resumed from; None if it started from scratch.
        changes: the configuration changes since that checkpoint was saved, one line each.
        strategy: the name of the strategy class.
        world_size: the number of ranks.
        stratagem: the version of this package.
    """

    name: str
    epoch: int
    iter: int
    checkpoint: str | None = None
    changes: tuple[str, ...] = ()
    strategy: str
    world_size: int
    stratagem: str = __version__

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the session that a record describes.

        Raises:
            TypeError: if the record does not describe a session.
        """
        # Earlier versions did not mask secrets.
        changes = tuple(mask_text(str(change)) for change in record.get("changes", ()))
        checkpoint = record.get("checkpoint")
        return cls(**{**record, "changes": changes, "checkpoint": mask_text(checkpoint) if checkpoint else None})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a session, with the position and the local time at which it ended."""

    how: str
    epoch: int
    iter: int
    at: str

    @classmethod
    def now(cls, how: str, *, epoch: int, iteration: int) -> Self:
        """Return an outcome with the current time."""
        return cls(how=how, epoch=epoch, iter=iteration, at=time.strftime("%Y-%m-%d %H:%M:%S"))


@final
class RunHistory:
    """The sessions of a run, from the first to the current one; every checkpoint contains this history."""

    def __init__(self, sessions: Sequence[Session] = ()) -> None:
        self.sessions = tuple(sessions)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> RunHistory:
        """Read the history from the ``meta`` of a checkpoint; it is empty if there is none."""
        try:
            return cls([Session.from_record(record) for record in meta.get(_KEY) or ()])
        except (TypeError, AttributeError):
            return cls()

    def with_session(self, session: Session) -> RunHistory:
        """Return this history with another session at the end."""
        return RunHistory((*self.sessions, session))

    def as_meta(self) -> dict[str, Any]:
        """Return the entry for the ``meta`` of a checkpoint."""
        return {_KEY: [asdict(session) for session in self.sessions]}

    def write(self, folder: Path, logger: logging.Logger, outcome: Outcome | None = None) -> None:
        """Write the record of the current session into its folder; log a warning if that fails."""
        record = {**self.as_meta(), "ending": None if outcome is None else asdict(outcome)}
        write_record(folder / RECORD, json.dumps(record, indent=1), logger)


def read_record(folder: Path) -> tuple[RunHistory, Outcome | None]:
    """Read a session record: the history up to that session, and its outcome (None if the session did not record an outcome).

    Raises:
        CheckpointDamagedError: if the record cannot be read.
    """
    file = folder / RECORD
    try:
        record = json.loads(read_bytes(file))
        sessions = [Session.from_record(session) for session in record[_KEY]]
        outcome = None if record["ending"] is None else Outcome(**record["ending"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    return RunHistory(sessions), outcome
