"""The options of the training loops, which are checked before a run exists."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.train.run.uneven_data import UnevenData, require_uneven_data

__all__ = ["EpochLoopOptions", "Intervals", "IterLoopOptions"]


@final
class Intervals:
    """An interval that changes at milestones.

    Args:
        interval: the interval before the first milestone.
        dynamic: pairs (milestone, interval).

    Raises:
        ConfigTypeError: if ``dynamic`` is not a list of pairs.
        ConfigValueError: if an interval is not a positive integer.
    """

    def __init__(self, interval: int, dynamic: Sequence[tuple[int, int]] | None) -> None:
        steps = sorted(_pair(each) for each in _pairs(dynamic))
        self._milestones = [0, *(milestone for milestone, _ in steps)]
        self._values = [_positive("val_interval", interval), *(_positive("interval", value) for _, value in steps)]

    def at(self, count: int) -> int:
        """Return the interval after ``count`` epochs or iterations."""
        return self._values[bisect.bisect(self._milestones, count) - 1]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EpochLoopOptions:
    """The options of :class:`EpochBasedTrainLoop`, which describes them.

    Raises:
        ConfigTypeError: if ``dynamic_intervals`` is not a list of pairs.
        ConfigValueError: if a number is not a positive integer, or ``uneven_data`` is unknown.
    """

    max_epochs: int
    val_begin: int = 1
    val_interval: int = 1
    dynamic_intervals: Sequence[tuple[int, int]] | None = None
    uneven_data: UnevenData = "error"

    def __post_init__(self) -> None:
        _positive("max_epochs", self.max_epochs)
        _require_val_begin(self.val_begin)
        self.intervals()
        require_uneven_data(self.uneven_data)

    def intervals(self) -> Intervals:
        """Return the numbers of epochs between validations."""
        return Intervals(self.val_interval, self.dynamic_intervals)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IterLoopOptions:
    """The options of :class:`IterBasedTrainLoop`, which describes them.

    Raises:
        ConfigTypeError: if ``dynamic_intervals`` is not a list of pairs.
        ConfigValueError: if not exactly one length is set, a number is not a positive integer, or ``uneven_data`` is unknown.
    """

    max_iters: int | None = None
    val_begin: int = 1
    val_interval: int = 1000
    dynamic_intervals: Sequence[tuple[int, int]] | None = None
    uneven_data: UnevenData = "error"
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.max_iters is None) == (self.max_steps is None):
            raise ConfigValueError("train_cfg: set either max_iters or max_steps.")
        if self.max_steps is None:
            _positive("max_iters", self.max_iters)
        else:
            _positive("max_steps", self.max_steps)
        _require_val_begin(self.val_begin)
        self.intervals()
        require_uneven_data(self.uneven_data)

    def iterations(self, accumulative_counts: int) -> int:
        """Return the number of iterations of the run if no update is skipped."""
        if self.max_steps is not None:
            return self.max_steps * accumulative_counts
        return self.max_iters or 0

    def intervals(self) -> Intervals:
        """Return the numbers of iterations between validations."""
        return Intervals(self.val_interval, self.dynamic_intervals)


def _positive(name: str, value: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigValueError(f"{name} must be a positive integer, got {value!r}.")
    return value


def _require_val_begin(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigValueError(
            f"val_begin must be a positive integer, or 0 to validate before the first update as well, got {value!r}."
        )


def _pairs(dynamic: Any) -> Sequence[Any]:
    if dynamic is not None and (isinstance(dynamic, str) or not isinstance(dynamic, Sequence)):
        raise ConfigTypeError(f"dynamic_intervals must be a list of pairs (milestone, interval), got {dynamic!r}.")
    return dynamic or ()


def _pair(each: Any) -> tuple[int, int]:
    is_pair = isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2
    if not is_pair or isinstance(each[0], bool) or not isinstance(each[0], int):
        raise ConfigTypeError(
            f"dynamic_intervals must be a list of pairs (milestone, interval), but contains {each!r}."
        )
    return each[0], each[1]
