"""Schedules of an option of the parameter groups, with MMEngine's recursive rules.

This module contains the schedules in steps and along polynomials, and has the names of all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stratagem.compat.mmengine.optim.scheduler.base_scheduler import INF, OptimizerType, _ParamScheduler
from stratagem.compat.mmengine.optim.scheduler.cosine_scheduler import (
    CosineAnnealingParamScheduler,
    CosineRestartParamScheduler,
    OneCycleParamScheduler,
)
from stratagem.compat.mmengine.optim.scheduler.plateau_scheduler import ReduceOnPlateauParamScheduler
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS
from stratagem.errors import ConfigValueError

__all__ = [
    "INF",
    "ConstantParamScheduler",
    "CosineAnnealingParamScheduler",
    "CosineRestartParamScheduler",
    "ExponentialParamScheduler",
    "LinearParamScheduler",
    "MultiStepParamScheduler",
    "OneCycleParamScheduler",
    "PolyParamScheduler",
    "ReduceOnPlateauParamScheduler",
    "StepParamScheduler",
    "_ParamScheduler",
]


@PARAM_SCHEDULERS.register_module()
class StepParamScheduler(_ParamScheduler):
    """Multiply the value by ``gamma`` every ``step_size`` positions.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        step_size: the number of positions between two reductions.
        gamma: the factor.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    counted_arguments = ("step_size",)

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        step_size: int,
        gamma: float = 0.1,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        factor = self.gamma if self.last_step and self.last_step % self.step_size == 0 else 1
        return [value * factor for value in self._values()]


@PARAM_SCHEDULERS.register_module()
class MultiStepParamScheduler(_ParamScheduler):
    """Multiply the value by ``gamma`` at each milestone.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        milestones: the positions, counted from ``begin``; one that is listed twice applies twice.
        gamma: the factor.
        last_step: see ``_ParamScheduler``.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    counted_arguments = ("milestones",)

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        milestones: Sequence[int],
        gamma: float = 0.1,
        last_step: int = -1,
        begin: int = 0,
        end: int = INF,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        # Checkpoints contain the milestones as a dict.
        return [value * self.gamma ** self.milestones.get(self.last_step, 0) for value in self._values()]


@PARAM_SCHEDULERS.register_module()
class ConstantParamScheduler(_ParamScheduler):
    """Multiply the value by ``factor`` in the range except its last position.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        factor: the factor, from 0 to 1.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        factor: float = 1.0 / 3,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        _require_fraction(type(self).__name__, "factor", factor)
        self.factor = factor
        self.total_iters = end - begin - 1
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        if self.last_step == 0:
            return [value * self.factor for value in self._values()]
        if self.last_step != self.total_iters:
            return self._values()
        # The value cannot be computed from 0.
        return [value * (1.0 / self.factor) for value in self._values()] if self.factor else list(self.base_values)


@PARAM_SCHEDULERS.register_module()
class ExponentialParamScheduler(_ParamScheduler):
    """Multiply the value by ``gamma`` at each position after the first.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        gamma: the factor.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        gamma: float,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        self.gamma = gamma
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        return self._values() if self.last_step == 0 else [value * self.gamma for value in self._values()]


@PARAM_SCHEDULERS.register_module()
class LinearParamScheduler(_ParamScheduler):
    """Multiply the value by a factor that changes linearly from ``start_factor`` to ``end_factor``.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        start_factor: the factor at the first position, from 0 to 1.
        end_factor: the factor at the last position, from 0 to 1.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        _require_fraction(type(self).__name__, "start_factor", start_factor)
        _require_fraction(type(self).__name__, "end_factor", end_factor)
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = end - begin - 1
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        if self.last_step == 0:
            return [value * self.start_factor for value in self._values()]
        change = self.end_factor - self.start_factor
        previous = self.total_iters * self.start_factor + (self.last_step - 1) * change
        if previous == 0:
            # The value cannot be computed from 0.
            return [base * change / self.total_iters for base in self.base_values]
        return [value * (1.0 + change / previous) for value in self._values()]


@PARAM_SCHEDULERS.register_module()
class PolyParamScheduler(_ParamScheduler):
    """Decay the value to a minimum polynomially.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        eta_min: the minimum of all groups, reached at the last position.
        power: the power of the polynomial.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        eta_min: float = 0,
        power: float = 1.0,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        self.eta_min = eta_min
        self.power = power
        self.total_iters = end - begin - 1
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        if self.last_step == 0:
            return self._values()
        factor = (1 - 1 / (self.total_iters - self.last_step + 1)) ** self.power
        return [(value - self.eta_min) * factor + self.eta_min for value in self._values()]


def _require_fraction(scheduler: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigValueError(f"{scheduler}: {name} must be between 0 and 1, got {value!r}.")
