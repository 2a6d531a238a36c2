"""The floating-point operations of the iterations between two log lines, and how much of the peak rate they use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from stratagem.hardware import device_of
from stratagem.tensors.flops import FlopKind
from stratagem.train.run.throughput import Rates

__all__ = ["FlopsMeter", "Peak", "peak_of_device"]

_MODEL: Final = "stratagem/model_flops"
_HARDWARE: Final = "stratagem/hardware_flops"
_IDEAL: Final = "stratagem/ideal_seconds"
_IDEAL_HARDWARE: Final = "stratagem/ideal_hardware_seconds"
_NAMES: Final = (_MODEL, _HARDWARE, _IDEAL, _IDEAL_HARDWARE)
_TERA: Final = 1e12

#: Returns the dense peak rate of a device for a kind of operations in FLOP/s; NaN if it is unknown.
Peak = Callable[[FlopKind], float]


def peak_of_device(device: torch.device) -> Peak:
    """Return a function that looks up the peak rate of a device in the table of devices."""
    known = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return lambda _: math.nan
    return lambda kind: known.peak_of(kind.dtype, allow_tf32=_uses_tf32(kind)) or math.nan


def _uses_tf32(kind: FlopKind) -> bool:
    """Return whether operations on float32 tensors use TF32 on CUDA devices."""
    backends: Any = torch.backends
    backend = backends.cudnn.conv if kind.operation == "convolution" else backends.cuda.matmul
    return str(backend.fp32_precision) == "tf32"


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """Operations, and the seconds that they take at the peak rate; ``hardware`` includes those that a model does not require."""

    model: float = 0.0
    hardware: float = 0.0
    ideal: float = 0.0
    ideal_hardware: float = 0.0

    @classmethod
    def of(cls, flops: Mapping[FlopKind, int], peak: Peak) -> _Work:
        model = {kind: count for kind, count in flops.items() if kind.part == "model"}
        return cls(
            model=sum(model.values()),
            hardware=sum(flops.values()),
            ideal=sum(count / peak(kind) for kind, count in model.items()),
            ideal_hardware=sum(count / peak(kind) for kind, count in flops.items()),
        )

    def plus(self, other: _Work, times: int = 1) -> _Work:
        return _Work(
            self.model + times * other.model,
            self.hardware + times * other.hardware,
            self.ideal + times * other.ideal,
            self.ideal_hardware + times * other.ideal_hardware,
        )


@final
class FlopsMeter:
    """Sums the operations of iterations on this rank.

    Args:
        peak: the peak rate of the device of this rank.
        num_steps: returns the number of optimizer steps of the run.
    """

    def __init__(self, peak: Peak, num_steps: Callable[[], int]) -> None:
        self._peak = peak
        self._num_steps = num_steps
        self._steps = num_steps()
        self._total = _Work()
        self._update: _Work | None = None
        self._works: dict[object, _Work] = {}
        self._is_complete = True

    def work_of(self, key: object) -> bool:
        """Add the operations of an iteration that is known by a key; return False if it is unknown."""
        work = self._works.get(key)
        if work is None:
            return False
        self._total = self._total.plus(work)
        return True

    def learn(self, key: object, flops: Mapping[FlopKind, int], *, has_update: bool) -> None:
        """Store the operations of iterations with a key, and those of an optimizer step if the iteration had one."""
        update: Counter[FlopKind] = Counter({kind: count for kind, count in flops.items() if kind.part == "update"})
        rest = {kind: count for kind, count in flops.items() if kind.part != "update"}
        self._works[key] = _Work.of(rest, self._peak)
        if has_update:
            self._update = _Work.of(update, self._peak)

    def skip(self) -> None:
        """Note an iteration whose operations are unknown, so that the rates are unknown until the next log line."""
        self._is_complete = False

    @property
    def has_update(self) -> bool:
        """Whether the operations of an optimizer step are known."""
        return self._update is not None

    @property
    def num_known(self) -> int:
        """The number of kinds of iterations whose operations are known."""
        return len(self._works)

    def counts(self) -> dict[str, float]:
        """Return the sums of this rank since the last call, to be averaged over the ranks; NaN if they are unknown."""
        steps = self._num_steps()
        total = self._total if self._update is None else self._total.plus(self._update, steps - self._steps)
        if not self._is_complete:
            total = _Work(math.nan, math.nan, math.nan, math.nan)
        self._total, self._steps, self._is_complete = _Work(), steps, True
        return dict(zip(_NAMES, (total.model, total.hardware, total.ideal, total.ideal_hardware), strict=True))

    def finish(self, means: dict[str, float], rates: Rates, world_size: int) -> dict[str, float]:
        """Remove the sums from the values that were averaged over the ranks; return the rates that are known.

        Args:
            means: values that include those of :meth:`counts`.
            rates: the iterations and their duration.
            world_size: the number of ranks.
        """
        model, hardware, ideal, ideal_hardware = (means.pop(name) for name in _NAMES)
        if rates.seconds <= 0:
            return {}
        found = {
            "tflops_per_second": model * world_size / rates.seconds / _TERA,
            "mfu": ideal / rates.seconds,
            "hfu": math.nan if hardware == model else ideal_hardware / rates.seconds,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}
