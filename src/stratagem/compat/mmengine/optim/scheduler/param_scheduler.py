"""Schedules of an option of the parameter groups, with MMEngine's recursive rules.

The schedules of ``stratagem.optim`` compute each value from the initial one. These compute it from the current value, because
users subclass them, and because schedules whose ranges overlap depend on it. Their state is the one in MMEngine's checkpoints.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, Final, Literal, Self

from torch.optim import Optimizer

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.schedules import ParamScheduler

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

INF: Final = 10**9
# The attribute of an optimizer or a wrapper with its number of updates when its last schedule was built.
_UPDATES: Final = "_updates_before_schedule"
_ORDER: Final = "See https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate."

OptimizerType = BaseOptimWrapper | Optimizer


class _ParamScheduler(ParamScheduler):
    """Base class of schedules. Subclasses implement ``_get_value``.

    A schedule is active in the range ``[begin, end)`` of epochs or iterations.

    Args:
        optimizer: the optimizer or its wrapper.
        param_name: the option of the parameter groups.
        begin: the first position of the range.
        end: the end of the range, exclusive.
        last_step: -1 to start from the beginning; otherwise, the groups must contain their initial values.
        by_epoch: whether positions are epochs or iterations.
        verbose: whether to log each change.

    Attributes:
        base_values: the initial value of each group.
        last_step: the number of positions in the range so far, minus 1.

    Raises:
        ConfigTypeError: if ``optimizer`` has another type.
        ConfigValueError: if the range is empty.
        ConfigKeyError: if a group has no initial value and ``last_step`` is not -1.
    """

    # Arguments that count positions, and what a state does not contain.
    counted_arguments: ClassVar[tuple[str, ...]] = ()
    _not_saved: ClassVar[tuple[str, ...]] = ("optimizer", "anneal_func")

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        # Not the constructor of the base class, whose rules differ.
        self._set_range(optimizer, param_name, begin, end, last_step, by_epoch, verbose)
        self.base_values = [group[f"initial_{param_name}"] for group in optimizer.param_groups]
        self._global_step = -1
        if isinstance(optimizer, Optimizer):
            _count_steps(optimizer)
        # Not an attribute of the schedule, whose attributes are its state.
        vars(optimizer)[_UPDATES] = _updates_of(optimizer)
        self.step()

    def _set_range(
        self,
        optimizer: OptimizerType,
        param_name: str,
        begin: int,
        end: int,
        last_step: int,
        by_epoch: bool,
        verbose: bool,
    ) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer | BaseOptimWrapper):
            raise ConfigTypeError(f"{name} requires an optimizer or its wrapper, got {type(optimizer).__name__}.")
        if end <= begin:
            raise ConfigValueError(f"{name}: end must be larger than begin, got begin={begin}, end={end}.")
        require(
            isinstance(last_step, int) and last_step >= -1,
            f"{name}: last_step must be an integer of at least -1, got {last_step!r}.",
        )
        initial = f"initial_{param_name}"
        for number, group in enumerate(optimizer.param_groups):
            if last_step == -1:
                group.setdefault(initial, group[param_name])
            elif initial not in group:
                raise ConfigKeyError(f"{name}: last_step={last_step}, but parameter group {number} has no {initial!r}.")
        self.optimizer = optimizer
        self.param_name = param_name
        self.begin = begin
        self.end = end
        self.by_epoch = by_epoch
        self.last_step = last_step
        self.verbose = verbose

    # Of the attributes of the base class, these two are derived from MMEngine's.
    @property
    def unit(self) -> Literal["epoch", "iter"]:  # type: ignore[override]
        """The unit of positions."""
        return "epoch" if self.by_epoch else "iter"

    @property
    def position(self) -> int:  # type: ignore[override]
        """The number of completed epochs or iterations."""
        return self._global_step

    last_step: int = -1  # an attribute, which is part of the state

    def transform(self, value: float, initial: float) -> float:
        """Raise an error: values are computed from the groups."""
        raise NotImplementedError(f"{type(self).__name__} has no transform. Implement _get_value.")

    def _get_value(self) -> list[float]:
        """Return the value of each group at ``last_step``, from the current values."""
        raise NotImplementedError(f"{type(self).__name__} must implement _get_value.")

    def _values(self) -> list[Any]:
        return [group[self.param_name] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes except the optimizer."""
        return {key: value for key, value in self.__dict__.items() if key not in self._not_saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state of this class or of MMEngine's class. The values are part of the optimizer's state."""
        self.__dict__.update({key: value for key, value in state_dict.items() if key not in self._not_saved})

    def describe(self) -> dict[str, Any]:
        """Return the settings, without the position."""
        varying = {"_global_step", "last_step", "_last_value", "verbose", "base_values"}
        settings = {key: value for key, value in self.state_dict().items() if key not in varying}
        return {"type": type(self).__name__, **settings}

    def differences(self, state_dict: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from a saved state: ``{name: (saved value, current value)}``."""
        own = self.describe()
        return {
            key: (value, own[key])
            for key, value in state_dict.items()
            if key in own and key != "type" and value != own[key]
        }

    def get_last_value(self) -> list[float]:
        """Return the value of each group after the last step."""
        return self._last_value

    def print_value(self, is_verbose: bool, group: int, value: float) -> None:
        """Log the value of a group if ``is_verbose``."""
        if is_verbose:
            print_log(f"{self.param_name} of parameter group {group} is now {value:.4e}.", logger="current")

    def step(self) -> None:  # type: ignore[override]  # MMEngine's schedules advance one position at a time
        """Advance by one position and set the new values in the parameter groups."""
        if self._global_step == 0:
            self._warn_of_order()
        self._global_step += 1
        if self.begin <= self._global_step < self.end:
            self.last_step += 1
            self._set(self._get_value())
        self._last_value = self._values()

    def _set(self, values: Sequence[float]) -> None:
        for number, (group, value) in enumerate(zip(self.optimizer.param_groups, values, strict=True)):
            group[self.param_name] = value
            self.print_value(self.verbose, number, value)

    def _warn_of_order(self) -> None:
        if isinstance(self.optimizer, Optimizer) and not hasattr(self.optimizer.step, "_with_counter"):
            warnings.warn(
                "optimizer.step was replaced after the parameter scheduler was built, so the order of optimizer.step() and "
                f"scheduler.step() cannot be checked. {_ORDER}",
                stacklevel=3,
            )
        elif _updates_of(self.optimizer) == vars(self.optimizer)[_UPDATES]:
            warnings.warn(
                "scheduler.step() was called before optimizer.step(), so the first value of the schedule is skipped. Call "
                f"optimizer.step() first. {_ORDER}",
                stacklevel=3,
            )

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, epoch_length: int | None = None, **kwargs: Any) -> Self:
        """Build an iteration-based schedule from arguments in epochs.

        Args:
            args: the optimizer, and ``param_name`` if the class has this argument.
            epoch_length: the number of iterations per epoch.
            kwargs: the other arguments.
        """
        name = cls.__name__
        require(
            kwargs.pop("by_epoch", True), f"{name}: only a schedule with by_epoch=True can be converted to iterations."
        )
        if not epoch_length or epoch_length < 0:
            raise InvalidArgumentError(
                f"{name}: converting to iterations requires a positive epoch_length, got {epoch_length!r}."
            )
        for key in ("begin", "end", *cls.counted_arguments):
            value = kwargs.get(key)
            if isinstance(value, list | tuple):
                kwargs[key] = [each * epoch_length for each in value]
            elif value is not None and value != INF:
                kwargs[key] = int(value * epoch_length)
        return cls(*args, **{**kwargs, "by_epoch": False})


def _updates_of(optimizer: OptimizerType) -> int:
    """Return a number that increases with each update, or each micro-batch."""
    if isinstance(optimizer, Optimizer):
        return optimizer._global_step  # type: ignore[attr-defined,no-any-return]
    return optimizer.inner_count + optimizer.num_steps_attempted


def _count_steps(optimizer: Optimizer) -> None:
    """Make an optimizer count the calls of ``step`` as ``_global_step``, from -1."""
    optimizer._global_step = -1  # type: ignore[attr-defined]
    step: Any = optimizer.step
    if getattr(step, "_with_counter", False):
        return
    function, owner = step.__func__, weakref.ref(optimizer)

    @wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        own: Any = owner()
        own._global_step += 1
        return function(own, *args, **kwargs)

    counting._with_counter = True  # type: ignore[attr-defined]
    optimizer.step = counting  # type: ignore[method-assign]


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
class ReduceOnPlateauParamScheduler(_ParamScheduler):
    """Reduce the value when a metric stops improving.

    Args:
        optimizer: see ``_ParamScheduler``.
        param_name: see ``_ParamScheduler``.
        monitor: the name of the metric.
        rule: whether ``"less"`` or ``"greater"`` is better.
        factor: the factor of each reduction.
        patience: the number of validations without improvement that are tolerated.
        threshold: the minimum improvement.
        threshold_rule: whether ``threshold`` is relative (``"rel"``) or absolute (``"abs"``).
        cooldown: the number of validations to ignore after a reduction.
        min_value: the lower bound, or a list with the bound of each group.
        eps: smaller reductions are skipped.
        begin: see ``_ParamScheduler``.
        end: see ``_ParamScheduler``.
        last_step: see ``_ParamScheduler``.
        by_epoch: must be True.
        verbose: see ``_ParamScheduler``.
    """

    need_val_args = True
    best: Any
    cooldown_counter: int

    def __init__(
        self,
        optimizer: OptimizerType,
        param_name: str,
        monitor: str = "loss",
        rule: str = "less",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_rule: str = "rel",
        cooldown: int = 0,
        min_value: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        name = type(self).__name__
        require(by_epoch, f"{name} advances after each validation, so by_epoch must be True.")
        self._set_range(optimizer, param_name, begin, end, last_step, by_epoch, verbose)
        if factor >= 1.0:
            raise ConfigValueError(f"{name}: factor must be smaller than 1, got {factor!r}.")
        self._global_step = 0
        self.factor = factor
        self.min_values = self._minimum_of_groups(min_value)
        self.patience = patience
        self.cooldown = cooldown
        self.eps = eps
        self.monitor = monitor
        self._init_is_better(rule, threshold, threshold_rule)
        self._reset()
        self._last_value = self._values()

    def _minimum_of_groups(self, min_value: float | Sequence[float]) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if not isinstance(min_value, list | tuple):
            return [min_value] * groups  # type: ignore[list-item]
        minima = list(min_value)
        # The last group of a wrapper may be the additional one, which has the minimum of the group before it.
        if getattr(self.optimizer, "base_param_settings", None) is not None:
            minima.append(minima[-1])
        if len(minima) != groups:
            raise ConfigValueError(
                f"{type(self).__name__}: min_value={min_value!r} must have a value for each of the parameter groups."
            )
        return minima

    def step(self, metrics: Mapping[str, Any] | None = None) -> None:  # type: ignore[override]
        """Advance by one validation with its metrics; without metrics, only count an epoch.

        Raises:
            ConfigTypeError: if the metrics are not a dict.
            ConfigKeyError: if they do not contain the monitored metric.
        """
        if metrics is None:
            self._global_step += 1
            return
        if not isinstance(metrics, dict):
            raise ConfigTypeError(f"metrics must be a dict, got {type(metrics).__name__}.")
        if self.begin <= self._global_step < self.end:
            self.last_step += 1
            if metrics.get(self.monitor) is None:
                raise ConfigKeyError(f"The metrics {list(metrics)} do not contain {self.monitor!r}.")
            self._update(metrics[self.monitor])
        self._last_value = self._values()

    def _update(self, metric: Any) -> None:
        if self._is_better(metric, self.best):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self._in_cooldown():
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def _reduce(self) -> None:
        values = zip(self.optimizer.param_groups, self._get_value(), strict=True)
        for number, (group, value) in enumerate(values):
            if group[self.param_name] - value > self.eps:
                group[self.param_name] = value
                self.print_value(self.verbose, number, value)

    def _get_value(self) -> list[float]:
        reduced = (float(value) * self.factor for value in self._values())
        return [max(value, low) for value, low in zip(reduced, self.min_values, strict=True)]

    def _in_cooldown(self) -> bool:
        return self.cooldown_counter > 0

    def _is_better(self, a: Any, best: Any) -> bool:
        change = -self.threshold if self.rule == "less" else self.threshold
        bound = best * (1.0 + change) if self.threshold_rule == "rel" else best + change
        return bool(a < bound if self.rule == "less" else a > bound)

    def _init_is_better(self, rule: str, threshold: float, threshold_rule: str) -> None:
        name = type(self).__name__
        if threshold < 0:
            raise ConfigValueError(f"{name}: threshold must not be negative, got {threshold!r}.")
        if rule not in ("less", "greater"):
            raise ConfigValueError(f'{name}: rule must be "less" or "greater", got {rule!r}.')
        if threshold_rule not in ("rel", "abs"):
            raise ConfigValueError(f'{name}: threshold_rule must be "rel" or "abs", got {threshold_rule!r}.')
        self.rule = rule
        self.threshold = threshold
        self.threshold_rule = threshold_rule
        self.rule_worse = INF if rule == "less" else -INF

    def _reset(self) -> None:
        """Forget the best metric."""
        self.best = self.rule_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0


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


def _require_fraction(scheduler: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigValueError(f"{scheduler}: {name} must be between 0 and 1, got {value!r}.")
