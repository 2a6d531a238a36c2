"""Schedules along a cosine: annealing, restarts and one cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.optim.scheduler.base_scheduler import INF, OptimizerType, _ParamScheduler
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS
from stratagem.errors import ConfigValueError

__all__ = ["CosineAnnealingParamScheduler", "CosineRestartParamScheduler", "OneCycleParamScheduler"]


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingParamScheduler(_ParamScheduler):
    """Anneal the value along a cosine (arXiv:1608.03983, without restarts).

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        T_max: half the period; by default, the length of the range.
        eta_min: the minimum of all groups, by default 0.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
        eta_min_ratio: the minimum as a fraction of the initial value of each group, instead of ``eta_min``.
    """

    counted_arguments = ("T_max",)

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        T_max: int | None = None,  # noqa: N803 -- MMEngine's name
        eta_min: float | None = None,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
        eta_min_ratio: float | None = None,
    ) -> None:
        if eta_min is None and eta_min_ratio is None:
            eta_min = 0.0
        _require_one_minimum(type(self).__name__, eta_min, eta_min_ratio)
        self.T_max = T_max or end - begin
        self.eta_min = eta_min
        self.eta_min_ratio = eta_min_ratio
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        if self.last_step == 0:
            return self._values()
        minima = _minima(self.base_values, self.eta_min, self.eta_min_ratio)
        if (self.last_step - 1 - self.T_max) % (2 * self.T_max) == 0:
            # The previous value is the minimum, from which no other value can be computed by a factor.
            rise = (1 - math.cos(math.pi / self.T_max)) / 2
            bases = zip(self._values(), self.base_values, minima, strict=True)
            return [value + (base - low) * rise for value, base, low in bases]
        return _along_cosine(self._values(), minima, self.last_step, self.T_max)


@PARAM_SCHEDULERS.register_module()
class CosineRestartParamScheduler(_ParamScheduler):
    """Anneal the value along cosines with restarts (arXiv:1608.03983).

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        periods: the length of each period.
        restart_weights: the factor of the initial value at the start of each period.
        eta_min: the minimum of all groups.
        eta_min_ratio: the minimum as a fraction of the initial value of each group, instead of ``eta_min``.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    counted_arguments = ("periods",)

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        periods: list[int],
        restart_weights: Sequence[float] = (1,),
        eta_min: float | None = None,
        eta_min_ratio: float | None = None,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        name = type(self).__name__
        _require_one_minimum(name, eta_min, eta_min_ratio)
        require(
            len(periods) == len(restart_weights),
            f"{name}: periods={periods} and restart_weights={restart_weights} must have the same length.",
        )
        self.periods = periods
        self.eta_min = eta_min
        self.eta_min_ratio = eta_min_ratio
        self.restart_weights = restart_weights
        self.cumulative_periods = [sum(periods[: number + 1]) for number in range(len(periods))]
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        number = self.get_position_from_periods(self.last_step, self.cumulative_periods)
        if number is None:
            return self._values()
        position = self.last_step - (self.cumulative_periods[number - 1] if number else 0)
        if position == 0:
            return [base * self.restart_weights[number] for base in self.base_values]
        minima = _minima(self.base_values, self.eta_min, self.eta_min_ratio)
        return _along_cosine(self._values(), minima, position, self.periods[number])

    @staticmethod
    def get_position_from_periods(iteration: int, cumulative_periods: Sequence[int]) -> int | None:
        """Return the index of the period that contains a position; None after the last one."""
        return next((number for number, end in enumerate(cumulative_periods) if iteration < end), None)


@PARAM_SCHEDULERS.register_module()
class OneCycleParamScheduler(_ParamScheduler):
    """Increase the learning rate to a maximum and decrease it again (arXiv:1708.07120).

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: must be ``"lr"``.
        eta_max: the maximum, or a list with the maximum of each group.
        total_steps: the length of the cycle; by default, that of the range.
        pct_start: the fraction of the cycle in which the value increases.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        div_factor: the maximum divided by the first value.
        final_div_factor: the first value divided by the last one.
        three_phase: whether the value decreases in two phases, first to the first value.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: see ``_ParamScheduler``.
        verbose: see ``_ParamScheduler``.
    """

    counted_arguments = ("total_steps",)

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        eta_max: float | Sequence[float] = 0,
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        name = type(self).__name__
        require(param_name == "lr", f"{name} schedules only lr, got param_name={param_name!r}.")
        if total_steps is not None and (not isinstance(total_steps, int) or total_steps <= 0):
            raise ConfigValueError(f"{name}: total_steps must be a positive integer, got {total_steps!r}.")
        if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
            raise ConfigValueError(f"{name}: pct_start must be a float from 0 to 1, got {pct_start!r}.")
        curves = {"cos": self._annealing_cos, "linear": self._annealing_linear}
        if anneal_strategy not in curves:
            raise ConfigValueError(f'{name}: anneal_strategy must be "cos" or "linear", got {anneal_strategy!r}.')
        self.eta_max = eta_max
        self.div_factor = div_factor
        self.final_div_factor = final_div_factor
        self.total_steps = end - begin if total_steps is None else total_steps
        self.anneal_func: Callable[[float, float, float], float] = curves[anneal_strategy]
        top = float(pct_start * self.total_steps)
        initial, highest, lowest = f"initial_{param_name}", f"max_{param_name}", f"min_{param_name}"
        phases: list[tuple[float, str, str]] = [(top - 1, initial, highest)]
        phases += [(2 * top - 2, highest, initial)] if three_phase else []
        phases.append((self.total_steps - 1, initial if three_phase else highest, lowest))
        self._schedule_phases = [
            {"end_step": end_step, f"start_{param_name}": start, f"end_{param_name}": stop}
            for end_step, start, stop in phases
        ]
        maxima = self._format_param(highest, optimizer, eta_max)
        if last_step == -1:
            for group, maximum in zip(optimizer.param_groups, maxima, strict=True):
                first = maximum / div_factor
                group.update({initial: first, highest: maximum, lowest: first / final_div_factor})
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    def _format_param(self, name: str, optimizer: OptimizerType, param: float | Sequence[float]) -> list[float]:
        """Return the value of each group."""
        groups = len(optimizer.param_groups)
        if not isinstance(param, list | tuple):
            return [param] * groups  # type: ignore[list-item]
        if len(param) != groups:
            raise ConfigValueError(
                f"{type(self).__name__}: {name} has {len(param)} values, but the optimizer has {groups} groups."
            )
        return list(param)

    @staticmethod
    def _annealing_cos(start: float, end: float, pct: float) -> float:
        return end + (start - end) / 2.0 * (math.cos(math.pi * pct) + 1)

    @staticmethod
    def _annealing_linear(start: float, end: float, pct: float) -> float:
        return (end - start) * pct + start

    def _get_value(self) -> list[float]:
        position = self.last_step
        if position > self.total_steps:
            raise ConfigValueError(
                f"{type(self).__name__} was advanced {position + 1} times, but total_steps={self.total_steps}."
            )
        ends: list[Any] = [phase["end_step"] for phase in self._schedule_phases]
        number = next((index for index, end in enumerate(ends) if position <= end), len(ends) - 1)
        start = ends[number - 1] if number else 0
        progress = (position - start) / (ends[number] - start)
        phase: dict[str, Any] = self._schedule_phases[number]
        first, last = phase[f"start_{self.param_name}"], phase[f"end_{self.param_name}"]
        return [self.anneal_func(group[first], group[last], progress) for group in self.optimizer.param_groups]


def _along_cosine(values: Sequence[float], minima: Sequence[float], position: int, period: int) -> list[float]:
    """Return the values after one position along a cosine that reaches the minima at ``period``."""
    factor = (1 + math.cos(math.pi * position / period)) / (1 + math.cos(math.pi * (position - 1) / period))
    return [factor * (value - low) + low for value, low in zip(values, minima, strict=True)]


def _minima(base_values: Sequence[float], eta_min: float | None, ratio: float | None) -> list[float]:
    return [(eta_min or 0.0) if ratio is None else base * ratio for base in base_values]


def _require_one_minimum(scheduler: str, eta_min: float | None, ratio: float | None) -> None:
    require(
        (eta_min is None) != (ratio is None),
        f"{scheduler}: set either eta_min or eta_min_ratio, got eta_min={eta_min!r} and eta_min_ratio={ratio!r}.",
    )
