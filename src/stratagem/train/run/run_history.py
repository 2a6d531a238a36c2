"""Which start of a run went on from which, from where, and with what changed."""

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

__all__ = ["RECORD", "Ending", "Lineage", "Start", "read_record"]

# In the folder of each start.
RECORD = "start.json"
_KEY = "lineage"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run.

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
            TypeError: if it is no record of a start.
        """
        # Earlier versions kept secrets.
        changes = tuple(mask_text(str(change)) for change in record.get("changes", ()))
        checkpoint = record.get("checkpoint")
        return cls(**{**record, "changes": changes, "checkpoint": mask_text(checkpoint) if checkpoint else None})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a start ended, where, and when in local time."""

    how: str
    epoch: int
    iter: int
    at: str

    @classmethod
    def now(cls, how: str, *, epoch: int, iteration: int) -> Self:
        """Return an ending of this moment."""
        return cls(how=how, epoch=epoch, iter=iteration, at=time.strftime("%Y-%m-%d %H:%M:%S"))


@final
class Lineage:
    """The starts that led to where a run is, the present one last."""

    def __init__(self, starts: Sequence[Start] = ()) -> None:
        self.starts = tuple(starts)

    @classmethod
    def of_checkpoint(cls, meta: Mapping[str, Any]) -> Lineage:
        """Return the one that a checkpoint's ``meta`` holds; without any it is empty."""
        try:
            return cls([Start.from_record(record) for record in meta.get(_KEY) or ()])
        except (TypeError, AttributeError):
            return cls()

    def followed_by(self, start: Start) -> Lineage:
        """Return the lineage with a start that goes on from it."""
        return Lineage((*self.starts, start))

    def as_meta(self) -> dict[str, Any]:
        """Return what a checkpoint's ``meta`` keeps of it."""
        return {_KEY: [asdict(start) for start in self.starts]}

    def write(self, folder: Path, ending: Ending | None = None) -> None:
        """Keep it in the folder of the present start."""
        record = {**self.as_meta(), "ending": None if ending is None else asdict(ending)}
        write_atomic(folder / RECORD, json.dumps(record, indent=1))


def read_record(folder: Path) -> tuple[Lineage, Ending | None]:
    """Return the lineage that the folder of a start keeps, and how the start ended; None where nobody wrote that down.

    Raises:
        CheckpointDamagedError: if the record cannot be read.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_bytes())
        starts = [Start.from_record(start) for start in record[_KEY]]
        ending = None if record["ending"] is None else Ending(**record["ending"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    return Lineage(starts), ending
