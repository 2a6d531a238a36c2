"""The trackers of a run: their common identity, which checkpoints contain, and the delivery of records."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

from stratagem.train.trackers.delivery import Delivery
from stratagem.train.trackers.tracker import EndState, TrackedRecord, TrackedRun, Tracker, TrackingEnd

__all__ = ["TrackedIdentity", "Tracking", "UpdateCounts"]

_KEY: Final = "tracking"
_NOT_VALUES: Final = frozenset({"mode", "epoch", "iter", "step", "updates"})
# Returns the number of updates of each optimizer by name; the name of a single optimizer is "updates".
UpdateCounts = Callable[[], Mapping[str, int]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedIdentity:
    """Identifies a run in the stores of its trackers.

    Attributes:
        id: the ID in all stores.
        session: the folder of the first session, relative to the work directory.
        parent: the ID of the run from which this one was started, or None.
        parent_checkpoint: the checkpoint from which this one was started, or None.
    """

    id: str
    session: str
    parent: str | None = None
    parent_checkpoint: str | None = None

    @classmethod
    def new(cls, session: str, parent: str | None, parent_checkpoint: str | None) -> Self:
        """Return an identity that no other run has."""
        return cls(
            id=f"{session}-{secrets.token_hex(4)}", session=session, parent=parent, parent_checkpoint=parent_checkpoint
        )

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self | None:
        """Return the identity in the ``meta`` of a checkpoint; None if that run had no trackers."""
        try:
            return cls(**meta[_KEY])
        except (KeyError, TypeError):
            return None

    def as_meta(self) -> dict[str, Any]:
        """Return the entry for the ``meta`` of a checkpoint."""
        entry = {
            "id": self.id, "session": self.session, "parent": self.parent, "parent_checkpoint": self.parent_checkpoint,
        }  # fmt: skip
        return {_KEY: entry}


@final
class Tracking:
    """The trackers of a run, as a recorder of the run. Their sessions begin and end with those of the run, on rank 0.

    Args:
        logger: logs problems of trackers.
        trackers: the trackers by name.
        config: the configuration as plain nested values, with secrets masked.

    Attributes:
        identity: identifies the run in the stores; None before the first session with trackers.
        config: the configuration as plain nested values, with secrets masked.
        outcome: how the session has ended.
    """

    def __init__(
        self,
        logger: logging.Logger,
        trackers: Mapping[str, Tracker] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.identity: TrackedIdentity | None = None
        self.config = config or {}
        self.outcome = (EndState.FAILED, "failed")
        self._parent: tuple[str | None, str | None] = (None, None)
        self._logger = logger
        self._trackers = dict(trackers or {})
        self._deliveries: Sequence[Delivery] = ()
        self._updates: UpdateCounts = dict
        self._last: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the trackers."""
        return tuple(self._trackers)

    @property
    def last_evaluations(self) -> Mapping[str, float]:
        """The values of the last evaluations by name."""
        return dict(self._last)

    def add(self, name: str, tracker: Tracker) -> None:
        """Add a tracker before the session begins, unless there is one of this name."""
        self._trackers.setdefault(name, tracker)

    def started_from(self, parent: str | None, checkpoint: str | None) -> None:
        """Record the run and the checkpoint from which this run, which is a new one, was started."""
        self.identity = None
        self._parent = (parent, checkpoint)

    def identify(self, session: str) -> TrackedIdentity:
        """Return the identity of the run, a new one for a new run."""
        if self.identity is None:
            self.identity = TrackedIdentity.new(session, *self._parent)
        return self.identity

    def as_meta(self) -> dict[str, Any]:
        """Return the entry for the ``meta`` of a checkpoint."""
        return {} if self.identity is None else self.identity.as_meta()

    def begin(self, run: TrackedRun, updates: UpdateCounts) -> None:
        """Begin a session.

        Raises:
            MissingDependencyError: if a package is not installed.
        """
        self.outcome = (EndState.FAILED, "failed")
        self._updates = updates
        self._last = {}
        busy = {each.name for each in self._deliveries if each.is_busy}
        for name in busy:
            self._logger.warning(
                "Tracker %s still works on the previous session and does not track this session.", name
            )
        usable = {name: tracker for name, tracker in self._trackers.items() if name not in busy}
        for tracker in usable.values():
            tracker.prepare()
        self._deliveries = [Delivery(name, tracker, run, self._logger) for name, tracker in usable.items()]

    def rewind(self, end: TrackingEnd, run: TrackedRun) -> None:
        """Continue the run from an earlier iteration in the same session."""
        for delivery in self._deliveries:
            delivery.restart(end, run)

    def finish(self, end: TrackingEnd) -> None:
        """End the session: wait until all trackers have finished, at most as long as the most patient one permits."""
        begun = time.monotonic()
        for delivery in self._deliveries:
            delivery.end(end)
        for delivery in self._deliveries:
            delivery.wait(begun + self._trackers[delivery.name].flush_s)

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass the numbers of a record to all trackers. Never blocks."""
        mode = record.get("mode", "train")
        values = {
            f"{mode}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name not in _NOT_VALUES
        }
        updates = dict(self._updates())
        if mode != "train":
            self._last.update(values)
        tracked = TrackedRecord(
            mode=mode,
            epoch=record["epoch"],
            iteration=record["iter"],
            updates=updates.pop("updates", None),
            values={**values, **{f"{mode}/{name}": float(count) for name, count in updates.items()}},
            time=time.time(),
        )
        for delivery in self._deliveries:
            delivery.put(tracked)

    def close(self) -> None:
        """Do nothing: the trackers are closed at the end of each session."""
