"""The base class of schedules with MMEngine's recursive rules.

The schedules of ``stratagem.optim`` compute each value from the initial one. These compute it from the current value, because
users subclass them, and because schedules whose ranges overlap depend on it. Their state is the one in MMEngine's checkpoints.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, Final, Literal, Self

from torch.optim import Optimizer

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.logging import print_log
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.schedules import ParamScheduler

__all__ = ["INF", "OptimizerType", "_ParamScheduler"]

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
