"""The interface of experiment trackers, and the values that they receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, final

__all__ = ["SUMMARY", "EndState", "TrackedRecord", "TrackedRun", "Tracker", "TrackingEnd"]

_TRAINING: Final = "train"
# The prefix of the values of a summary, in stores without a separate place for it.
SUMMARY: Final = "summary"


@final
class EndState(Enum):
    """How a session ended."""

    COMPLETE = "complete"
    #: A hook stopped the run.
    STOPPED = "stopped"
    #: A signal stopped the run.
    INTERRUPTED = "interrupted"
    #: An exception was raised.
    FAILED = "failed"
    #: The run continues from an earlier checkpoint in the same process.
    ROLLED_BACK = "rolled back"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """A run, as a tracker receives it at the start of each session.

    Attributes:
        id: identifies the run in the store of the tracker. All sessions that resume in the same work directory have the same ID.
        name: the experiment name, for people; by default, the name of the work directory.
        work_dir: the work directory.
        folder: the folder of the first session of the run, for trackers that write files.
        config: the configuration as nested plain values; secrets are masked.
        facts: the lineage of the run and its environment by name: the previous session, the checkpoint that was resumed, the
            Git revision, versions, and others. Secrets are masked.
        resumed_at: the number of completed iterations at which a session continues the run; None for a new run. What the store
            contains for later iterations belongs to a discarded part of the run, and the tracker removes it.
        validated: whether the run was already validated after ``resumed_at`` iterations. If not, it is validated again.
    """

    id: str
    name: str
    work_dir: Path
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    resumed_at: int | None = None
    validated: bool = False

    def keeps(self, name: str, iteration: int) -> bool:
        """Return whether a stored value remains part of the run.

        Args:
            name: the name of the value, such as ``train/loss``, or only its mode. Values of an earlier summary, whose names
                start with ``summary/``, are not kept.
            iteration: the iteration for which it was logged.
        """
        mode = name.partition("/")[0]
        if self.resumed_at is None:
            return True
        if mode == SUMMARY:
            return False
        return iteration < self.resumed_at or (iteration == self.resumed_at and (self.validated or mode == _TRAINING))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRecord:
    """The values of a log line or an evaluation.

    Attributes:
        mode: "train", "val" or "test".
        epoch: the current epoch of a training record, counted from 1; for an evaluation, the number of completed epochs.
        iteration: the number of completed iterations.
        updates: the number of updates that the optimizer has applied; None if there are several optimizers.
        values: the values by name, such as ``train/loss`` or ``val/accuracy``.
        time: when the values were logged, in seconds since the epoch.
    """

    mode: str
    epoch: int
    iteration: int
    updates: int | None
    values: Mapping[str, float]
    time: float

    def position(self) -> dict[str, int]:
        """Return the position by name: ``epoch``, ``iter`` and, if there is only one optimizer, ``updates``."""
        updates = {} if self.updates is None else {"updates": self.updates}
        return {"epoch": self.epoch, "iter": self.iteration, **updates}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingEnd:
    """How a session ended.

    Attributes:
        state: how the session ended, for programs.
        outcome: how it ended, for people, such as ``stopped by SIGTERM``.
        epoch: the number of completed epochs.
        iteration: the number of completed iterations.
        best: the best values of the metrics in ``save_best``, as ``val/accuracy``.
        last: the values of the last evaluations.
    """

    state: EndState
    outcome: str
    epoch: int
    iteration: int
    best: Mapping[str, float] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, str | float]:
        """Return the final summary by name."""
        return {
            "outcome": self.outcome,
            "final_epoch": self.epoch,
            "final_iter": self.iteration,
            **{f"best/{name}": value for name, value in self.best.items()},
            **{f"last/{name}": value for name, value in self.last.items()},
        }


class Tracker:
    """Base class of experiment trackers. A tracker stores the records of a run, for example in a file or on a server.

    All methods are called on rank 0 and in a thread of the tracker, so a slow method delays only this tracker. Exceptions are
    logged and do not stop the run. If ``start`` fails, it is called again later, and records wait in the meantime.

    Attributes:
        queue_size: the number of records that may wait for the tracker; further records are dropped.
        flush_s: how long the end of a session waits for the tracker, in seconds.
    """

    queue_size: int = 10_000
    flush_s: float = 60.0

    def prepare(self) -> None:
        """Import packages. Called in the main thread before data workers are started, unlike the other methods.

        Raises:
            MissingDependencyError: if a package is not installed.
        """

    def start(self, run: TrackedRun) -> None:
        """Open the store. If ``run.resumed_at`` is set, continue the run and remove what ``run.keeps`` does not keep."""
        raise NotImplementedError

    def log(self, record: TrackedRecord) -> None:
        """Store a record."""
        raise NotImplementedError

    def finish(self, end: TrackingEnd) -> None:
        """Store the summary and close the store. ``start`` may be called again afterwards."""
        raise NotImplementedError
