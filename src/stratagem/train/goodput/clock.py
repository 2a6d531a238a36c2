"""Divide the wall time of a session into phases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Final, NamedTuple, final

from stratagem.train.run.progress import Progress, StepTimer
from stratagem.utils.processes import read_process_stat

__all__ = ["DATA", "EVALUATION", "OTHER", "PHASES", "SAVE", "START", "TRAIN", "Event", "Reading", "SessionClock"]

START: Final = "start"
TRAIN: Final = "train"
DATA: Final = "data"
SAVE: Final = "save"
EVALUATION: Final = "evaluation"
OTHER: Final = "other"
PHASES: Final = (START, TRAIN, DATA, SAVE, EVALUATION, OTHER)

# Whether a session has begun in this process. The first one began when the process started.
_sessions_begun = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The time of a session up to a moment.

    Attributes:
        elapsed: seconds since the session began.
        iter: completed iterations.
        seconds: the seconds in each phase, which sum to ``elapsed``.
    """

    elapsed: float
    iter: int
    seconds: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that is recorded at once: a save begins (``save``) or is durable (``saved``), or a rollback.

    A rollback consists of two events: training is ``discarded``, and the run is ``rolled back``.

    Attributes:
        kind: the name of the event.
        iter: completed iterations that a checkpoint contains, or at which the run continues.
    """

    kind: str
    iter: int


class _State(NamedTuple):
    """The seconds of the phases that ended, the current phase, and when it began."""

    seconds: Mapping[str, float]
    phase: str
    since: float


@final
class SessionClock:
    """Measures how long a session spends in each phase. It is read by another thread.

    A change of the phase takes a few microseconds. Iterations cost nothing, because the training loop measures the time that it
    waits for batches in any case.

    Args:
        timer: measures the waits for batches.
        progress: counts the iterations.

    Attributes:
        on_event: called with each event; set by the recorder of the session.
    """

    def __init__(self, timer: StepTimer, progress: Progress) -> None:
        self.on_event: Callable[[Event], None] | None = None
        self._timer, self._progress = timer, progress
        self._waited_before = 0.0
        self._used = False
        self._began = perf_counter()
        self._state = _State({}, START, self._began)

    def begin_session(self) -> float:
        """Begin to measure a session; return the time at which it began, in seconds since the epoch.

        The first session of a process began with the process, and the first one of a run with the creation of the run.
        """
        global _sessions_begun  # noqa: PLW0603 -- a fact about the process
        now = perf_counter()
        if self._used:
            self._began = now
        elif not _sessions_begun and not _is_interactive():
            self._began = now - (_process_age() or now - self._began)
        self._used = _sessions_begun = True
        self._state = _State({}, START, self._began)
        self._waited_before = self._timer.all_data_seconds
        return time.time() - (now - self._began)

    def end_start_up(self, *, measured: bool = True) -> None:
        """End the start-up.

        Args:
            measured: whether the loop measures its training. If not, all time outside of saves and evaluations is training.
        """
        self._change_to(OTHER if measured else TRAIN)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time in the context to a phase; a context inside of another one interrupts it."""
        outer = self._state.phase
        self._change_to(name)
        try:
            yield
        finally:
            self._change_to(outer)

    def mark(self, kind: str, iteration: int) -> None:
        """Record an event at once. May be called in any thread."""
        if self.on_event is not None:
            self.on_event(Event(kind=kind, iter=iteration))

    def read(self) -> Reading:
        """Return the time of the session so far. May be called in any thread."""
        state, waited, iteration = self._state, self._timer.all_data_seconds, self._progress.iter
        now = perf_counter()
        seconds = _add(state, now)
        # A wait that ended after the state was read could exceed the time that the state contains.
        data = max(0.0, min(waited - self._waited_before, seconds.get(TRAIN, 0.0)))
        seconds[TRAIN], seconds[DATA] = seconds.get(TRAIN, 0.0) - data, data
        return Reading(elapsed=now - self._began, iter=iteration, seconds=seconds)

    def _change_to(self, phase: str) -> None:
        now = perf_counter()
        # A single assignment, because another thread reads the state.
        self._state = _State(_add(self._state, now), phase, now)


def _add(state: _State, now: float) -> dict[str, float]:
    return {**state.seconds, state.phase: state.seconds.get(state.phase, 0.0) + now - state.since}


def _process_age() -> float | None:
    """Return the seconds since this process started; None if the platform does not record it."""
    try:
        ticks = float(read_process_stat(os.getpid())[1])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    # In a container with its own clock, the difference is meaningless.
    return age if time.process_time() * 0.01 <= age < 10 * 365 * 86400 else None


def _is_interactive() -> bool:
    """Return whether a person types commands into this process, which is therefore much older than the run."""
    return bool(hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules)
