"""Which session of a run went on from which, from where, and with what changed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from stratagem._version import __version__
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import write_atomic
from stratagem.utils import mask_text

__all__ = ["RECORD", "Outcome", "RunHistory", "Session", "read_record"]

# In the folder of each session.
RECORD = "start.json"
_KEY = "lineage"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One session of a run.

    Attributes:
        name: ``<run's folder>/<time>``, which is also where its log is.
        epoch: epochs that were done when it began.
        iter: iterations that were done when it began.
        checkpoint: from which it went on; None where it began anew.
        changes: what was changed in the configuration since that checkpoint was saved, a line each.
        strategy: the class of its strategy.
        world_size: its ranks.
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
        """Return what was written down.

        Raises:
            TypeError: if it is no record of a session.
        """
        # Earlier versions kept secrets.
        changes = tuple(mask_text(str(change)) for change in record.get("changes", ()))
        checkpoint = record.get("checkpoint")
        return cls(**{**record, "changes": changes, "checkpoint": mask_text(checkpoint) if checkpoint else None})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a session ended, where, and when in local time."""

    how: str
    epoch: int
    iter: int
    at: str

    @classmethod
    def now(cls, how: str, *, epoch: int, iteration: int) -> Self:
        """Return an outcome of this moment."""
        return cls(how=how, epoch=epoch, iter=iteration, at=time.strftime("%Y-%m-%d %H:%M:%S"))


@final
class RunHistory:
    """The sessions that led to where a run is, the present one last."""

    def __init__(self, sessions: Sequence[Session] = ()) -> None:
        self.sessions = tuple(sessions)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> RunHistory:
        """Return the one that a checkpoint's ``meta`` holds; without any it is empty."""
        try:
            return cls([Session.from_record(record) for record in meta.get(_KEY) or ()])
        except (TypeError, AttributeError):
            return cls()

    def with_session(self, session: Session) -> RunHistory:
        """Return the history with a session that goes on from it."""
        return RunHistory((*self.sessions, session))

    def as_meta(self) -> dict[str, Any]:
        """Return what a checkpoint's ``meta`` keeps of it."""
        return {_KEY: [asdict(session) for session in self.sessions]}

    def write(self, folder: Path, outcome: Outcome | None = None) -> None:
        """Keep it in the folder of the present session."""
        record = {**self.as_meta(), "ending": None if outcome is None else asdict(outcome)}
        write_atomic(folder / RECORD, json.dumps(record, indent=1))


def read_record(folder: Path) -> tuple[RunHistory, Outcome | None]:
    """Return the history that the folder of a session keeps, and how the session ended; None where nobody wrote that down.

    Raises:
        CheckpointDamagedError: if the record cannot be read.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_bytes())
        sessions = [Session.from_record(session) for session in record[_KEY]]
        outcome = None if record["ending"] is None else Outcome(**record["ending"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    return RunHistory(sessions), outcome
