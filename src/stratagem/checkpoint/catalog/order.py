"""Order checkpoints by the time at which they were saved.

The checkpoints of a run are ordered by two counters instead of the clock or the iteration: clocks may be set back, and
iterations repeat after a rollback or a resume from an older checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar, final

__all__ = ["SAVE_ORDER", "HasSaveTime", "SaveOrder", "oldest_first", "sort_one_run"]

# The key in a checkpoint's meta and in its manifest.
SAVE_ORDER: Final = "save_order"
# The largest integer that all JSON parsers represent exactly.
_MAX_COUNT: Final = (1 << 53) - 1


@final
@dataclass(frozen=True, slots=True, order=True)
class SaveOrder:
    """A sort key for the checkpoints of a run. The key of a newer checkpoint is greater.

    Attributes:
        session: the number of the session (one start of the run) that saved the checkpoint, from 1.
        save: the number of the save within the session, from 1, assigned when the save is requested.
    """

    session: int
    save: int

    def as_meta(self) -> dict[str, int]:
        """Return the order as it is stored in a checkpoint's ``meta`` and in its manifest."""
        return {"session": self.session, "save": self.save}

    @classmethod
    def from_meta(cls, value: Any) -> Self | None:
        """Read an order from ``meta["save_order"]``; return None if it is None, as in checkpoints of older versions.

        Raises:
            ValueError: if the value is not two positive integers.
        """
        if value is None:
            return None
        session, save = (_count(value.get(key)) if isinstance(value, Mapping) else None for key in ("session", "save"))
        if session is None or save is None:
            raise ValueError(
                f"its {SAVE_ORDER} is {value!r:.100}; expected a session number and a save number, which start from 1."
            )
        return cls(session, save)

    @staticmethod
    def next_session(orders: Iterable[SaveOrder | None]) -> int:
        """Return the number of the session that follows the sessions of these checkpoints."""
        return min(1 + max((order.session for order in orders if order is not None), default=0), _MAX_COUNT)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value <= _MAX_COUNT else None


class HasSaveTime(Protocol):
    """A checkpoint with the attributes that determine when it was saved."""

    @property
    def run_id(self) -> str | None:
        """The id of the run that saved it, if known."""

    @property
    def order(self) -> SaveOrder | None:
        """The sort key of the checkpoint within its run, if known."""

    @property
    def saved_at(self) -> float:
        """The time of the save, in seconds since the epoch."""

    @property
    def number(self) -> int:
        """Its epoch or iteration, used to break ties between equal times."""

    @property
    def path(self) -> Path:
        """The path of the checkpoint."""


T = TypeVar("T", bound=HasSaveTime)


def oldest_first(checkpoints: Iterable[T]) -> list[T]:
    """Return checkpoints ordered from oldest to newest.

    The checkpoints of a run are adjacent and ordered by session and save number. Runs are ordered by the time of their
    newest checkpoint. Checkpoints without these numbers are ordered by time. A checkpoint without a run ID is treated
    as a separate run.
    """
    by_run: dict[str | int, list[T]] = {}
    for index, each in enumerate(checkpoints):
        by_run.setdefault(index if each.run_id is None else each.run_id, []).append(each)
    runs = sorted((sort_one_run(each) for each in by_run.values()), key=lambda run: _time_key(run[-1]))
    return [each for run in runs for each in run]


def sort_one_run(checkpoints: Iterable[T]) -> list[T]:
    """Return the checkpoints of a single run ordered from oldest to newest."""
    listed = list(checkpoints)
    by_order = {(each.order.session, each.order.save): each for each in listed if each.order is not None}
    if len(by_order) == len(listed):
        # Without unnumbered checkpoints and copies, the times do not matter.
        return [by_order[order] for order in sorted(by_order)]
    by_clock = sorted(listed, key=_time_key)
    numbered = sorted(((each.order, each) for each in by_clock if each.order is not None), key=lambda pair: pair[0])
    # If the clock was set back, treat a checkpoint as saved no earlier than its predecessors.
    times = accumulate((each.saved_at for _, each in numbered), max)
    dated = [(time, each) for time, (_, each) in zip(times, numbered, strict=True)]
    unnumbered = [(each.saved_at, each) for each in by_clock if each.order is None]
    # The sort is stable.
    return [each for _, each in sorted([*unnumbered, *dated], key=lambda pair: pair[0])]


def _time_key(checkpoint: HasSaveTime) -> tuple[float, int, str]:
    return checkpoint.saved_at, checkpoint.number, str(checkpoint.path)
