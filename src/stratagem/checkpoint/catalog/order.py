"""Which checkpoint is newer.

Within a run two counters decide, and no clock: clocks are set back, and iterations repeat after a rollback or a resume
from an older checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar, final

__all__ = ["SAVE_ORDER", "HasSaveTime", "SaveOrder", "oldest_first"]

# Under which a checkpoint's meta and its manifest have it.
SAVE_ORDER: Final = "save_order"
# The largest integer that every reader of JSON represents exactly.
_LARGEST: Final = (1 << 53) - 1


@final
@dataclass(frozen=True, slots=True, order=True)
class SaveOrder:
    """The place of a checkpoint among those of its run; the newer is the greater.

    Attributes:
        session: number of the session (one start of the run) that saved it, from 1.
        save: number of the save within the run's process, from 1, assigned when the save is requested.
    """

    session: int
    save: int

    def as_meta(self) -> dict[str, int]:
        """Return it as a checkpoint's ``meta`` and its manifest have it."""
        return {"session": self.session, "save": self.save}

    @classmethod
    def from_meta(cls, value: Any) -> Self | None:
        """Return the order that ``meta["save_order"]`` holds; None if it holds none, as before there was one.

        Raises:
            ValueError: if it is anything else than two counts.
        """
        if value is None:
            return None
        session, save = (_count(value.get(key)) if isinstance(value, Mapping) else None for key in ("session", "save"))
        if session is None or save is None:
            raise ValueError(f"its {SAVE_ORDER} is {value!r:.100}; expected a session and a save, both counted from 1.")
        return cls(session, save)

    @staticmethod
    def next_session(orders: Iterable[SaveOrder | None]) -> int:
        """Return the number of a session that begins where there are checkpoints of these orders."""
        return min(1 + max((order.session for order in orders if order is not None), default=0), _LARGEST)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value <= _LARGEST else None


class HasSaveTime(Protocol):
    """What tells when a checkpoint was saved."""

    @property
    def run_id(self) -> str | None:
        """The run that saved it, if known."""

    @property
    def order(self) -> SaveOrder | None:
        """Its place among those of its run, if known."""

    @property
    def saved_at(self) -> float:
        """When it was saved, by the clock."""

    @property
    def number(self) -> int:
        """Its epochs or iterations, for clocks that tick slowly."""

    @property
    def path(self) -> Path:
        """Where it is."""


T = TypeVar("T", bound=HasSaveTime)


def oldest_first(checkpoints: Iterable[T]) -> list[T]:
    """Return checkpoints ordered from the oldest to the newest.

    Those of a run are together, ordered by session and save. The clock decides only between runs, by the newest checkpoint
    of each, and for checkpoints that have no such numbers. A checkpoint without a run's id stands for a run of its own.
    """
    by_run: dict[str | int, list[T]] = {}
    for index, each in enumerate(checkpoints):
        by_run.setdefault(index if each.run_id is None else each.run_id, []).append(each)
    runs = sorted((_of_one_run(each) for each in by_run.values()), key=lambda run: _by_clock(run[-1]))
    return [each for run in runs for each in run]


def _of_one_run(checkpoints: Iterable[T]) -> list[T]:
    by_clock = sorted(checkpoints, key=_by_clock)
    numbered = sorted(((each.order, each) for each in by_clock if each.order is not None), key=lambda pair: pair[0])
    # If the clock was set back, a checkpoint counts as saved no earlier than those before it.
    times = accumulate((each.saved_at for _, each in numbered), max)
    dated = [(time, each) for time, (_, each) in zip(times, numbered, strict=True)]
    unnumbered = [(each.saved_at, each) for each in by_clock if each.order is None]
    # Sorting keeps the order of equal times.
    return [each for _, each in sorted([*unnumbered, *dated], key=lambda pair: pair[0])]


def _by_clock(checkpoint: HasSaveTime) -> tuple[float, int, str]:
    return checkpoint.saved_at, checkpoint.number, str(checkpoint.path)
