"""Compute the goodput of a run from the recorded times of all its sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, final

from stratagem.train.goodput.clock import DATA, PHASES, TRAIN
from stratagem.train.goodput.recorder import TIMES

__all__ = ["LABELS", "Goodput", "Moment", "SessionTimes", "account", "goodput_of", "lineage_of", "read_sessions"]

RESTART: Final = "restart"
REPEATED: Final = "repeated"

# The parts of the wall time of a run, in the order in which they are reported.
LABELS: Final[Mapping[str, str]] = {
    TRAIN: "training that counted",
    "start": "start-up",
    DATA: "waiting for data",
    "save": "saving",
    "evaluation": "evaluation",
    RESTART: "restarts",
    REPEATED: "repeated work",
    "other": "other",
}

_MINUTE_S: Final = 60

# Outcomes after which the time until the next session is a pause, not a loss.
_DELIBERATE: Final = frozenset({"complete", "stopped early"})


@final
@dataclass(frozen=True, slots=True)
class Moment:
    """A record of a session: the event, the time since the session began, the iterations, and the seconds by phase."""

    event: str
    elapsed: float
    iter: int
    seconds: Mapping[str, float]


@final
@dataclass(slots=True, kw_only=True)
class SessionTimes:
    """The recorded times of one session.

    Attributes:
        folder: the folder of the session.
        began: the time at which it began, in seconds since the epoch.
        run_id: the ID of its run; None if it ended before the run was prepared.
        continues: whether it continues the previous session in the work directory although it found no checkpoint.
        outcome: how it ended; None if it was killed or is still running.
        moments: its records in order.
    """

    folder: Path
    began: float
    run_id: str | None = None
    continues: bool = False
    outcome: str | None = None
    moments: list[Moment] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        """The seconds from its beginning to its last record."""
        return self.moments[-1].elapsed if self.moments else 0.0

    @property
    def ended(self) -> float:
        """The time of its last record, in seconds since the epoch."""
        return self.began + self.elapsed

    @property
    def first_iter(self) -> int:
        """The completed iterations at its start."""
        return next((moment.iter for moment in self.moments if moment.event == "session"), 0)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Where the wall time of a run went.

    Attributes:
        wall: the total in seconds, without pauses after sessions that ended as planned.
        seconds: the seconds of each part (see ``LABELS``), which sum to ``wall``.
        sessions: the number of sessions.
    """

    wall: float
    seconds: Mapping[str, float]
    sessions: int

    @property
    def share(self) -> float:
        """The part of the wall time that trained iterations that count, from 0 to 1."""
        return self.seconds[TRAIN] / self.wall if self.wall > 0 else 0.0

    def describe(self) -> str:
        """Return the share and where the rest went, as one line."""
        rest = ", ".join(
            f"{label} {100 * self.seconds[name] / self.wall:.1f} %"
            for name, label in LABELS.items()
            if name != TRAIN and self.wall > 0 and self.seconds[name] >= 0.0005 * self.wall
        )
        where = "1 session" if self.sessions == 1 else f"{self.sessions} sessions"
        wall = f"{self.wall:.1f} s" if self.wall < _MINUTE_S else str(timedelta(seconds=round(self.wall)))
        return f"Goodput: {100 * self.share:.1f} % of {wall} in {where}{'; the rest: ' + rest if rest else ''}."

    def record(self) -> dict[str, Any]:
        """Return the values for the log record: ``goodput`` and the seconds of each part."""
        parts = {f"{name}_s": round(seconds, 3) for name, seconds in self.seconds.items()}
        return {"goodput": round(self.share, 6), "wall_s": round(self.wall, 3), "sessions": self.sessions, **parts}


def goodput_of(work_dir: Path, folder: Path | None = None) -> Goodput | None:
    """Return the goodput of the run in a work directory, over its sessions there; None if no times are recorded.

    Args:
        work_dir: the work directory.
        folder: the folder of the last session to consider; by default, the newest session.
    """
    sessions = lineage_of(read_sessions(work_dir), folder)
    return account(sessions) if sessions else None


def read_sessions(work_dir: Path) -> list[SessionTimes]:
    """Return the recorded sessions in a work directory, oldest first. Damaged lines are skipped."""
    sessions = [session for file in work_dir.glob(f"*/{TIMES}") for session in _read(file)]
    return sorted(sessions, key=lambda session: session.began)


def lineage_of(sessions: Sequence[SessionTimes], folder: Path | None = None) -> list[SessionTimes]:
    """Return the sessions that belong to the same run as the last one in ``folder`` (by default, the newest), up to it.

    Sessions of a run have the same ID. A session that should have resumed but found no checkpoint continues the previous one. A
    session that ended before it was prepared belongs to the run that was prepared next.
    """
    if folder is not None:
        while sessions and sessions[-1].folder != folder:
            sessions = sessions[:-1]
    lineages: list[list[SessionTimes]] = []
    by_id: dict[str, list[SessionTimes]] = {}
    unidentified: list[SessionTimes] = []
    for session in sessions:
        if session.run_id is None:
            unidentified.append(session)
        else:
            known = by_id.get(session.run_id)
            if known is None and session.continues and lineages and lineages[-1][-1].outcome not in _DELIBERATE:
                known = lineages[-1]
            if known is None:
                lineages.append(known := [])
            by_id[session.run_id] = known
            known += [*unidentified, session]
            unidentified = []
    newest = max(lineages, key=lambda lineage: lineage[-1].began, default=[])
    return [*newest, *unidentified]


def account(sessions: Sequence[SessionTimes]) -> Goodput:
    """Divide the wall time of the sessions of a run into its parts."""
    totals = dict.fromkeys(LABELS, 0.0)
    work = _Work()
    last: SessionTimes | None = None
    for session in sessions:
        if last is not None and last.outcome not in _DELIBERATE:
            # A process can start before the previous one has ended, and clocks of machines differ.
            totals[RESTART] += max(0.0, session.began - last.ended)
        work.follow(session)
        for name, seconds in (session.moments[-1].seconds if session.moments else {}).items():
            totals[name] += seconds
        last = session
    if last is not None and last.outcome == "failed":
        work.lose_unsaved()
    totals[TRAIN] -= work.lost_train
    totals[DATA] -= work.lost_data
    totals[REPEATED] = work.lost_train + work.lost_data
    return Goodput(wall=sum(totals.values()), seconds=totals, sessions=len(sessions))


@dataclass(frozen=True, slots=True)
class _Point:
    """The seconds of training, and of waiting for its data, that led to an iteration."""

    iter: int
    train: float
    data: float


@final
class _Work:
    """The training that led to each iteration, and the training that was lost because a later session repeats it."""

    def __init__(self) -> None:
        self.lost_train = self.lost_data = 0.0
        self._points: list[_Point] = []
        self._saved: int | None = None
        self._train = self._data = 0.0

    def follow(self, session: SessionTimes) -> None:
        """Add the training of a session."""
        base_train, base_data = self._train, self._data
        identified = False
        for moment in session.moments:
            identified = identified or moment.event == "session"
            if not identified:
                continue  # The run has not been resumed yet, so its iteration is unknown.
            self._train = base_train + moment.seconds.get(TRAIN, 0.0)
            self._data = base_data + moment.seconds.get(DATA, 0.0)
            if moment.event in {"session", "rolled back"}:
                self._rewind(moment.iter)
                self._saved = moment.iter
            elif moment.event == "saved":
                # A background save is durable some iterations later.
                self._saved = moment.iter
            else:
                self._add(moment.iter)

    def lose_unsaved(self) -> None:
        """Discard the training since the last checkpoint."""
        if self._saved is not None:
            self._rewind(self._saved)

    def _add(self, iteration: int) -> None:
        self._points.append(_Point(iteration, self._train - self.lost_train, self._data - self.lost_data))

    def _rewind(self, iteration: int) -> None:
        """Continue from an earlier iteration: the training after it is lost."""
        at = self._at(iteration)
        self.lost_train = self._train - at.train
        self.lost_data = self._data - at.data
        while self._points and self._points[-1].iter >= iteration:
            self._points.pop()
        self._points.append(at)

    def _at(self, iteration: int) -> _Point:
        """Return the point of an iteration, interpolated between two points if there is none."""
        now = _Point(iteration, self._train - self.lost_train, self._data - self.lost_data)
        later: _Point | None = None
        for point in reversed(self._points):
            if point.iter < iteration:
                return now if later is None else _between(point, later, iteration)
            later = point
        # The run was resumed at an earlier point than the first one here, or it begins.
        return now if later is None else _Point(iteration, later.train, later.data)


def _between(before: _Point, after: _Point, iteration: int) -> _Point:
    """Return the point between two points; the later one is the first record of its iteration."""
    part = (iteration - before.iter) / (after.iter - before.iter)
    return _Point(
        iteration, before.train + part * (after.train - before.train), before.data + part * (after.data - before.data)
    )


def _read(file: Path) -> Iterator[SessionTimes]:
    """Yield the sessions in a file: a program may train several times in one folder."""
    session: SessionTimes | None = None
    for record in _records(file):
        event = record.get("event")
        try:
            if event == "begin":
                if session is not None:
                    yield session
                session = SessionTimes(folder=file.parent, began=float(record["time"]))
            elif session is not None:
                session.moments.append(_moment(record))
                if event == "session":
                    session.run_id, session.continues = str(record["run_id"]), bool(record["continues"])
                elif event == "end":
                    session.outcome = str(record["outcome"])
        except (KeyError, TypeError, ValueError):
            continue
    if session is not None:
        yield session


def _moment(record: Mapping[str, Any]) -> Moment:
    return Moment(
        str(record["event"]),
        float(record["elapsed"]),
        int(record["iter"]),
        {name: float(record[name]) for name in PHASES if name in record},
    )


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed process may be incomplete
                if isinstance(record, dict):
                    yield record
    except OSError:
        return
