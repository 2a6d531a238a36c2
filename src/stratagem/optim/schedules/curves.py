"""Schedule curves as pure functions of the position in a range.

Positions are 0 to ``span - 1``. ``at`` is computed once per position, ``apply`` once per parameter group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

from stratagem.errors import ConfigValueError

__all__ = [
    "Constant",
    "CosineAnnealing",
    "CosineRestart",
    "Curve",
    "Exponential",
    "Linear",
    "MultiStep",
    "OneCycle",
    "PerGroup",
    "Poly",
    "Step",
    "WarmupStableDecay",
    "value_of",
]


@dataclass(frozen=True)
class Curve(ABC):
    """Base class of curves; the fields of a curve are its configuration options.

    Attributes:
        counted: the fields that count positions; they are multiplied by the epoch length when epochs are converted to iterations.
        per_group: the fields that are values of the option. A number is multiplied by the ratio of each group, so that groups
            keep their ratios; a list contains the value of each group.
    """

    counted: ClassVar[tuple[str, ...]] = ()
    per_group: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def at(self, position: int, span: int) -> float:
        """Return the ``shape`` argument of ``apply`` for a position; for most curves, it is a factor."""

    def apply(self, shape: float, value: float, initial: float, ratio: float, number: int) -> float:
        """Return the transformed value of a group.

        Args:
            shape: the result of ``at``.
            value: the value to transform.
            initial: the group's value at the start of the run.
            ratio: ``initial`` relative to the optimizer's own value, for example ``lr_mult``.
            number: the index of the group.
        """
        del initial, ratio, number
        return value * shape


PerGroup: TypeAlias = float | Sequence[float]


def value_of(setting: PerGroup, ratio: float, number: int) -> float:
    """Return the value of a group: an item of a list, or a number multiplied by the group's ratio.

    Raises:
        ConfigValueError: if a group was added for which the list has no value.
    """
    if isinstance(setting, int | float):
        return setting * ratio
    if number >= len(setting):
        raise ConfigValueError(
            f"Parameter group {number} was added to the optimizer, but a schedule has a list of {len(setting)} values, "
            f"{list(setting)!r}. Use a single number, which each group scales by its own ratio."
        )
    return setting[number]


class TowardsFloor(Curve, ABC):
    """A curve that scales the distance to a minimum: ``eta_min``, or ``eta_min_ratio`` times the initial value."""

    eta_min: PerGroup | None
    eta_min_ratio: float | None

    per_group = ("eta_min",)

    def __post_init__(self) -> None:
        if isinstance(self.eta_min, list):
            object.__setattr__(self, "eta_min", tuple(self.eta_min))
        if self.eta_min is not None and self.eta_min_ratio is not None:
            raise ConfigValueError(
                f"eta_min={self.eta_min!r} and eta_min_ratio={self.eta_min_ratio!r} both specify the minimum. Specify "
                "only one of them."
            )

    def apply(self, shape: float, value: float, initial: float, ratio: float, number: int) -> float:
        share = self.eta_min_ratio
        floor = value_of(self.eta_min or 0.0, ratio, number) if share is None else share * initial
        return floor + (value - floor) * shape


@final
@dataclass(frozen=True)
class Constant(Curve):
    """The value times ``factor`` before the last position, and the unscaled value from the last position on.

    Attributes:
        factor: the factor, from 0 to 1.
    """

    factor: float = 1 / 3

    def __post_init__(self) -> None:
        _require_fraction("factor", self.factor)

    def at(self, position: int, span: int) -> float:
        return self.factor if position < span - 1 else 1.0


@final
@dataclass(frozen=True)
class Linear(Curve):
    """A factor that changes linearly from ``start_factor`` at the first position to ``end_factor`` at the last.

    Attributes:
        start_factor: the factor at the first position, from 0 to 1.
        end_factor: the factor at the last position and after it, from 0 to 1.
    """

    start_factor: float = 1 / 3
    end_factor: float = 1.0

    def __post_init__(self) -> None:
        _require_fraction("start_factor", self.start_factor)
        _require_fraction("end_factor", self.end_factor)

    def at(self, position: int, span: int) -> float:
        if position >= span - 1:
            return self.end_factor
        return self.start_factor + (self.end_factor - self.start_factor) * position / (span - 1)


@final
@dataclass(frozen=True)
class Step(Curve):
    """Multiply the value by ``gamma`` every ``step_size`` positions.

    Attributes:
        step_size: the number of positions between two reductions.
        gamma: the factor of each reduction.
    """

    step_size: int
    gamma: float = 0.1

    counted = ("step_size",)

    def __post_init__(self) -> None:
        _require_counts("step_size", [self.step_size])

    def at(self, position: int, span: int) -> float:
        return self.gamma ** (position // self.step_size)


@final
@dataclass(frozen=True)
class MultiStep(Curve):
    """Multiply the value by ``gamma`` at each milestone; a milestone that is listed twice applies twice.

    Attributes:
        milestones: the positions of the reductions, counted from ``begin``.
        gamma: the factor of each reduction.
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    counted = ("milestones",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))

    def at(self, position: int, span: int) -> float:
        factor = 1.0
        for milestone in self.milestones:
            if position < milestone:
                break
            factor *= self.gamma
        return factor


@final
@dataclass(frozen=True)
class Exponential(Curve):
    """Multiply the value by ``gamma`` at each position.

    Attributes:
        gamma: the factor.
    """

    gamma: float

    def at(self, position: int, span: int) -> float:
        return float(self.gamma**position)


@final
@dataclass(frozen=True)
class CosineAnnealing(TowardsFloor):
    """Half a cosine period over ``T_max`` positions, by default the whole range (arXiv:1608.03983, without restarts).

    Attributes:
        T_max: the number of positions in which the value reaches the minimum; by default, the length of the range.
        eta_min: the minimum, by default 0. A number is multiplied by the ratio of each group, such as ``lr_mult``; a list
            contains the minimum of each group.
        eta_min_ratio: the minimum as a fraction of the initial value; replaces ``eta_min``.
    """

    T_max: int | None = None
    eta_min: PerGroup | None = None
    eta_min_ratio: float | None = None

    counted = ("T_max",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.T_max is not None:
            _require_counts("T_max", [self.T_max])

    def at(self, position: int, span: int) -> float:
        period = span if self.T_max is None else self.T_max
        return 0.5 * (1.0 + math.cos(math.pi * position / period))


@final
@dataclass(frozen=True)
class CosineRestart(TowardsFloor):
    """A sequence of half cosine periods with the lengths ``periods``, scaled by ``restart_weights`` (arXiv:1608.03983).

    Attributes:
        periods: the number of positions of each period.
        restart_weights: the factor of the value at the beginning of each period.
        eta_min: the minimum. A number is multiplied by the ratio of each group, such as ``lr_mult``; a list contains the
            minimum of each group.
        eta_min_ratio: the minimum as a fraction of the initial value; replaces ``eta_min``.
    """

    periods: Sequence[int]
    restart_weights: Sequence[float] = (1.0,)
    eta_min: PerGroup | None = None
    eta_min_ratio: float | None = None

    counted = ("periods",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta_min is None and self.eta_min_ratio is None:
            raise ConfigValueError("A cosine schedule with restarts requires a minimum. Set eta_min or eta_min_ratio.")
        if not self.periods or len(self.periods) != len(self.restart_weights):
            raise ConfigValueError(
                f"periods={list(self.periods)!r} and restart_weights={list(self.restart_weights)!r} must have the "
                "same length, at least 1."
            )
        _require_counts("periods", self.periods)
        object.__setattr__(self, "periods", tuple(self.periods))
        object.__setattr__(self, "restart_weights", tuple(self.restart_weights))

    def at(self, position: int, span: int) -> float:
        start = 0
        for period, weight in zip(self.periods, self.restart_weights, strict=True):
            if position < start + period:
                return 0.5 * weight * (1.0 + math.cos(math.pi * (position - start) / period))
            start += period
        return 0.0


@final
@dataclass(frozen=True)
class Poly(Curve):
    """Polynomial decay from the value at the first position to ``eta_min`` at the last.

    Attributes:
        eta_min: the value at the end. A number is multiplied by the ratio of each group; a list contains the value of each group.
        power: the exponent; 1 is a linear decay.
    """

    eta_min: PerGroup = 0.0
    power: float = 1.0

    per_group = ("eta_min",)

    def __post_init__(self) -> None:
        if isinstance(self.eta_min, list):
            object.__setattr__(self, "eta_min", tuple(self.eta_min))

    def at(self, position: int, span: int) -> float:
        if position >= span - 1:
            return 0.0
        return float((1.0 - position / (span - 1)) ** self.power)

    def apply(self, shape: float, value: float, initial: float, ratio: float, number: int) -> float:
        floor = value_of(self.eta_min, ratio, number)
        return floor + (value - floor) * shape


@final
@dataclass(frozen=True)
class OneCycle(Curve):
    """Increase the value to ``eta_max`` and decrease it again (1cycle policy, arXiv:1708.07120).

    The optimizer's own value has no effect; only the ratio of each group's value to it matters: a group with
    ``lr_mult=0.1`` increases to ``0.1 * eta_max``. If ``eta_max`` is a list, it contains the maximum of each group.

    The value starts at ``eta_max / div_factor`` and ends at its start value divided by ``final_div_factor``. ``pct_start``
    is the fraction of the range in which it increases. With ``three_phase``, it returns to the start value over an equal
    fraction of the range, and decreases to the end value over the remainder.

    Attributes:
        eta_max: the maximum, or a list with the maximum of each group.
        total_steps: the number of positions of the cycle; by default, the length of the range.
        pct_start: the fraction of the cycle in which the value increases.
        anneal_strategy: the shape of the curve, ``"cos"`` or ``"linear"``.
        div_factor: the maximum divided by the value at the start.
        final_div_factor: the value at the start divided by the value at the end.
        three_phase: whether the value first returns to its start value and then decreases to the end value.
    """

    eta_max: PerGroup
    total_steps: int | None = None
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    counted = ("total_steps",)
    per_group = ("eta_max",)

    def __post_init__(self) -> None:
        if isinstance(self.eta_max, list):
            object.__setattr__(self, "eta_max", tuple(self.eta_max))
        _require_fraction("pct_start", self.pct_start)
        if self.anneal_strategy not in ("cos", "linear"):
            raise ConfigValueError(f'Unknown anneal_strategy={self.anneal_strategy!r}. Use "cos" or "linear".')
        if self.total_steps is not None:
            _require_counts("total_steps", [self.total_steps])

    def at(self, position: int, span: int) -> float:
        total = span if self.total_steps is None else self.total_steps
        # If eta_max is a list, the shape is a fraction of each group's maximum.
        highest = self.eta_max if isinstance(self.eta_max, int | float) else 1.0
        first = highest / self.div_factor
        last = first / self.final_div_factor
        top = self.pct_start * total - 1
        ends = [(top, first, highest)]
        if self.three_phase:
            ends += [(2 * top, highest, first), (total - 1, first, last)]
        else:
            ends += [(total - 1, highest, last)]
        start = 0.0
        for end, begin_value, end_value in ends:
            if position <= end:
                progress = (position - start) / (end - start) if end > start else 1.0
                return self._between(begin_value, end_value, progress)
            start = end
        return last

    def apply(self, shape: float, value: float, initial: float, ratio: float, number: int) -> float:
        del value, initial
        if isinstance(self.eta_max, int | float):
            return shape * ratio
        return shape * value_of(self.eta_max, ratio, number)

    def _between(self, begin_value: float, end_value: float, progress: float) -> float:
        if self.anneal_strategy == "linear":
            return begin_value + (end_value - begin_value) * progress
        return end_value + (begin_value - end_value) * 0.5 * (1.0 + math.cos(math.pi * progress))


@final
@dataclass(frozen=True)
class WarmupStableDecay(TowardsFloor):
    """Linear warm-up, a constant phase, and a decay to the minimum at the last position (arXiv:2404.06395).

    Attributes:
        decay: the number of positions of the decay.
        warmup: the number of positions of the warm-up.
        start_factor: the factor at the first position, from 0 to 1.
        shape: the shape of the decay: ``"linear"``, ``"cosine"`` or ``"sqrt"``, which is ``1 - sqrt(progress)``
            (arXiv:2405.18392).
        eta_min: the minimum, by default 0. A number is multiplied by the ratio of each group, such as ``lr_mult``; a list
            contains the minimum of each group.
        eta_min_ratio: the minimum as a fraction of the initial value; replaces ``eta_min``.
    """

    decay: int
    warmup: int = 0
    start_factor: float = 0.001
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    eta_min: PerGroup | None = None
    eta_min_ratio: float | None = None

    counted = ("decay", "warmup")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("start_factor", self.start_factor)
        _require_counts("decay", [self.decay])
        if self.shape not in ("linear", "cosine", "sqrt"):
            raise ConfigValueError(f'Unknown shape={self.shape!r}. Use "linear", "cosine" or "sqrt".')

    def at(self, position: int, span: int) -> float:
        if position < self.warmup:
            return self.start_factor + (1.0 - self.start_factor) * position / self.warmup
        progress = (position - span + 1 + self.decay) / self.decay
        if progress <= 0.0:
            return 1.0
        if self.shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0 - (progress if self.shape == "linear" else math.sqrt(progress))


def _require_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigValueError(f"{name} must be between 0 and 1, got {value!r}.")


def _require_counts(name: str, values: Sequence[int]) -> None:
    if not all(isinstance(value, int) and value > 0 for value in values):
        raise ConfigValueError(f"{name} must be positive integers, got {values!r}.")
