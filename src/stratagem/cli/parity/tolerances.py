"""Derive what counts as rounding from a reference in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from stratagem.trace import Difference, Part

__all__ = ["CAPS", "FACTOR", "FLOOR", "Noise", "StepTolerances", "constant_tolerances", "noise_of", "tolerances_of"]

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


@final
@dataclass(frozen=True, slots=True)
class Noise:
    """The rounding errors of the reference: by part and name, the largest relative error up to each step."""

    errors: Mapping[tuple[Part, str], tuple[float, ...]]
    num_steps: int

    def of(self, part: Part, name: str, step: int) -> float:
        """Return the rounding error of a value, or of a typical value of the same part if that is larger."""
        own = self.errors.get((part, name))
        typical = statistics.median(
            [each[step - 1] for (where, _), each in self.errors.items() if where is part] or [0.0]
        )
        return max(own[step - 1] if own else 0.0, typical)

    def largest(self, step: int) -> float:
        """Return the largest rounding error up to a step."""
        return max((each[step - 1] for each in self.errors.values()), default=0.0)


def noise_of(differences: Sequence[Iterable[Difference]]) -> Noise:
    """Return the rounding errors, given the differences between the reference and a reference in float64 in each step."""
    errors: dict[tuple[Part, str], list[float]] = {}
    for index, found in enumerate(differences):
        for each in found:
            errors.setdefault((each.part, each.name), [0.0] * len(differences))[index] = max(
                each.relative, errors.get((each.part, each.name), [0.0] * len(differences))[index]
            )
    return Noise({key: tuple(_running_maximum(each)) for key, each in errors.items()}, len(differences))


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
    """

    cap: float
    noise: Noise | None = None
    source: str = ""
    _kept: dict[tuple[Part, str, int], float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def floor(self) -> float:
        """The size of a tensor, relative to the largest one of its kind, below which differences are relative to that size."""
        return FLOOR

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


def tolerances_of(noise: Noise, dtype: str) -> StepTolerances:
    """Return the tolerances that follow from the rounding errors of a reference in a dtype."""
    source = f"{FACTOR:g} times the distance of the reference from a run in float64, at most {CAPS[dtype]:g}"
    return StepTolerances(cap=CAPS[dtype], noise=noise, source=source)


def constant_tolerances(value: float, source: str) -> StepTolerances:
    """Return the same tolerance for all values that may be rounded."""
    return StepTolerances(cap=value, source=source)
