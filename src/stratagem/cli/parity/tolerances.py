"""Derive what counts as rounding from runs in float64 and with differently rounded gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from stratagem.trace import Difference, Part, Trace

__all__ = [
    "CAPS",
    "FACTOR",
    "FLOOR",
    "Noise",
    "StepTolerances",
    "constant_tolerances",
    "moves_of",
    "noise_of",
    "tolerances_of",
]

#: A difference may be this many times as large as the rounding error of the reference.
FACTOR: Final = 10.0
#: Tensors that are smaller than this, relative to the largest one of the same kind in the step, are compared relative to it.
FLOOR: Final = 1e-3
#: The largest tolerance by dtype, however large the rounding errors are.
CAPS: Final[Mapping[str, float]] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}
#: The tolerance without a reference in float64.
DEFAULTS: Final[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
# Parameters, averages and losses are float32 in all dtypes; a few roundings always count as rounding.
_LEAST: Final = 4 * 2.0**-23
# Computed in Python, from the same numbers.
_EXACT: Final[Mapping[Part, float]] = {Part.DATA: 0.0, Part.SCHEDULE: 1e-12}
# A movement is measured in another dtype than the difference.
_MARGIN: Final = 1.01
_AFTER_OPTIMIZER: Final = frozenset({Part.START, Part.UPDATE, Part.AVERAGE})


@final
@dataclass(frozen=True, slots=True)
class Noise:
    """The rounding errors of the reference: by part and name, the largest relative error up to each step."""

    errors: Mapping[tuple[Part, str], tuple[float, ...]]

    def of(self, part: Part, name: str, step: int) -> float:
        """Return the rounding error of a value, or of a typical value of the same part if that is larger."""
        own = self.errors.get((part, name))
        typical = statistics.median(
            [each[step - 1] for (where, _), each in self.errors.items() if where is part] or [0.0]
        )
        return max(own[step - 1] if own else 0.0, typical)


def noise_of(differences: Sequence[Iterable[Difference]]) -> Noise:
    """Return the rounding errors, given the differences between the reference and the runs that measure them, by step."""
    errors: dict[tuple[Part, str], list[float]] = {}
    for index, found in enumerate(differences):
        for each in found:
            series = errors.setdefault((each.part, each.name), [0.0] * len(differences))
            series[index] = max(series[index], _measured(each))
    return Noise({key: tuple(_running_maximum(each)) for key, each in errors.items()})


def _running_maximum(values: Iterable[float]) -> Iterable[float]:
    largest = 0.0
    for value in values:
        largest = max(largest, value)
        yield largest


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepTolerances:
    """The largest relative differences that count as rounding.

    Attributes:
        cap: the largest tolerance.
        noise: the rounding errors of the reference; None to use ``cap`` for all values.
        source: where the tolerances come from, for people.
        moves: for each parameter, how far an element has moved up to each step, at most; None to permit no exception.
    """

    cap: float
    noise: Noise | None = None
    source: str = ""
    moves: Mapping[str, tuple[float, ...]] | None = None
    _kept: dict[tuple[Part, str, int], float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def floor(self) -> float:
        """The size of a tensor, relative to the largest one of its kind, below which differences are relative to that size."""
        return FLOOR

    def first_exceeding(self, differences: Sequence[Difference]) -> Difference | None:
        """Return the first difference of a step that is not rounding, given all in the order of the parts.

        Optimizers such as Adam move an element whose gradient is close to zero by the learning rate in the direction of its
        rounding error. Therefore, a tenth of the elements of a parameter may differ by twice the distance of their movement. The
        tolerances of the following step grow by the factor by which its parameters differ more than otherwise permitted.
        """
        excess = self.excess(differences)
        return next((each for each in differences if not self._allows(each, excess)), None)

    def excess(self, differences: Sequence[Difference]) -> float:
        """Return the factor for the tolerances of a step, at least 1."""
        if self.moves is None:
            return 1.0
        factors = [
            each.relative / self.of(each.part, each.name, each.step)
            for each in differences
            if each.part is Part.START and self._allows(each, 1.0)
        ]
        return max([1.0, *factors])

    def _allows(self, difference: Difference, excess: float) -> bool:
        limit = self.of(difference.part, difference.name, difference.step)
        if difference.part is Part.DATA or math.isnan(difference.relative):
            return False
        limit = limit if difference.part is Part.START else limit * excess
        if difference.relative <= limit:
            return True
        moves = None if self.moves is None else self.moves.get(difference.name)
        if not moves or difference.part not in _AFTER_OPTIMIZER or not difference.typical <= limit:
            return False
        return difference.size <= 2 * moves[min(difference.step, len(moves)) - 1] * _MARGIN

    def ratio(self, difference: Difference, excess: float = 1.0) -> float:
        """Return the size of a difference relative to its tolerance, given the factor for the tolerances of the step."""
        size = difference.relative if self.moves is None else _measured(difference)
        limit = self.of(difference.part, difference.name, difference.step) * excess
        return 0.0 if not size else size / limit if limit else math.inf

    def of(self, part: Part, name: str, step: int) -> float:
        """Return the tolerance for a value in a step, counted from 1."""
        if part in _EXACT:
            return _EXACT[part]
        if self.noise is None:
            return self.cap
        key = part, name, step
        if key not in self._kept:
            noise = self.noise.of(part, name, step)
            allowed = min(self.cap, max(_LEAST, FACTOR * noise))
            # The value consists of rounding errors, so there is nothing to compare.
            self._kept[key] = math.inf if self._is_hidden(part, name) else allowed
        return self._kept[key]

    def hidden(self) -> list[str]:
        """Return the values whose rounding error alone exceeds the cap, so that they are not compared, with their parts."""
        parts: dict[str, list[str]] = {}
        for part, name in self.noise.errors if self.noise else ():
            if self._is_hidden(part, name):
                parts.setdefault(name, []).append(str(part))
        return [f"{name} ({', '.join(parts[name])})" for name in sorted(parts)]

    def _is_hidden(self, part: Part, name: str) -> bool:
        errors = None if self.noise is None else self.noise.errors.get((part, name))
        return errors is not None and part not in _EXACT and errors[-1] > self.cap


def _measured(difference: Difference) -> float:
    """Return the size that is compared with the tolerance: after the optimizer, that of a typical element."""
    return difference.typical if difference.part in _AFTER_OPTIMIZER else difference.relative


def tolerances_of(noise: Noise, dtype: str, moves: Mapping[str, tuple[float, ...]] | None = None) -> StepTolerances:
    """Return the tolerances that follow from the rounding errors of a reference in a dtype, and from its movement."""
    source = (
        f"{FACTOR:g} times the distance of the reference from runs in float64 and with differently rounded gradients, at most "
        f"{CAPS[dtype]:g}"
    )
    return StepTolerances(cap=CAPS[dtype], noise=noise, source=source, moves=moves)


def constant_tolerances(value: float, source: str) -> StepTolerances:
    """Return the same tolerance for all values that may be rounded."""
    return StepTolerances(cap=value, source=source)


def moves_of(trace: Trace) -> dict[str, tuple[float, ...]]:
    """Return for each parameter how far an element has moved up to each step of a trace, at most."""
    moves: dict[str, list[float]] = {}
    for step in trace.ranks[0].steps:
        for name, after in (step.after or {}).items():
            before = (step.before or {}).get(name)
            size = 0.0 if before is None else after.largest_difference(after.exact() - before.exact())
            series = moves.setdefault(name, [])
            series.append(size + (series[-1] if series else 0.0))
    return {name: tuple(series) for name, series in moves.items()}
