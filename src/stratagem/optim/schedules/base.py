"""The base class of parameter schedulers: range, position and state."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self, cast

from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.mixed import MixedOptimizer
from stratagem.optim.schedules.chain import chain_of
from stratagem.utils.names import did_you_mean

__all__ = ["FOREVER", "ParamScheduler", "Unit", "unit_of"]

logger = logging.getLogger(__name__)

Unit = Literal["epoch", "iter", "step"]

FOREVER: Final = 10**9
_UNITS: Final = ("epoch", "iter", "step")


class ParamScheduler(ABC):
    """Change one option of all parameter groups during a run. Subclasses implement ``transform``.

    A position is an epoch, an iteration or an optimizer update, depending on ``by_epoch`` and ``by``. The scheduler is
    active in the range ``[begin, end)`` of positions. Before ``begin``, nothing changes; from ``end`` on, the last
    transformation stays in effect. Schedulers for the same option of an optimizer form a chain. Each transforms the result
    of the previous schedulers in the chain, and the first one transforms the group's initial value.

    Args:
        optimizer: the optimizer or its wrapper.
        param_name: the option, such as ``lr``, ``weight_decay`` or ``momentum``; ``momentum`` is ``betas[0]`` for optimizers
            with ``betas``.
        begin: the first position of the range.
        end: the end of the range, exclusive.
        last_step: -1 to start from the beginning; otherwise the last completed position, counted from ``begin``.
        by_epoch: whether positions count epochs rather than iterations (micro-batches, calls to ``train_step``).
        by: the unit ``"epoch"``, ``"iter"`` or ``"step"`` (optimizer updates); None to use ``by_epoch``.
        verbose: whether to log each change.

    Attributes:
        unit: ``"epoch"``, ``"iter"`` or ``"step"``: the unit of positions, after which the training loop calls
            ``step``.
        position: the number of epochs, iterations or updates that the run has completed.
        started: whether the range has begun.

    Raises:
        ConfigTypeError: if ``optimizer`` is neither an optimizer nor a wrapper.
        ConfigValueError: if the range is empty, or ``last_step`` or ``by`` is invalid.
        ConfigKeyError: if a group does not have the option or, with ``last_step``, has no ``initial_<option>``.
    """

    need_val_args: ClassVar[bool] = False
    # Constructor arguments that count positions.
    counted_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        optimizer: Optimizer | BaseOptimWrapper,
        param_name: str,
        begin: int = 0,
        end: int = FOREVER,
        last_step: int = -1,
        *,
        by_epoch: bool = True,
        by: Unit | None = None,
        verbose: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer | BaseOptimWrapper):
            raise ConfigTypeError(
                f"{type(self).__name__} requires an optimizer or its wrapper, got {type(optimizer).__name__}."
            )
        own = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
        if isinstance(own, MixedOptimizer):
            raise ConfigValueError(
                f"{type(self).__name__}: the parts of a MixedOptimizer have separate schedules. Pass one of its parts, such as "
                f"optimizer.parts[{next(iter(own.parts))!r}], or the configuration of the schedule."
            )
        if not end > begin >= 0:
            raise ConfigValueError(
                f"{type(self).__name__}: begin={begin}, end={end} is not a valid range; it must satisfy end > begin >= 0."
            )
        if not isinstance(last_step, int) or last_step < -1:
            raise ConfigValueError(
                f"{type(self).__name__}: last_step must be an integer of at least -1, got {last_step!r}."
            )
        self.optimizer = optimizer
        self.param_name = param_name
        self.begin = begin
        self.end = end
        self.unit: Unit = unit_of(by, by_epoch=by_epoch)
        self.by_epoch = self.unit == "epoch"
        self.verbose = verbose
        self.started = False
        self.position = 0 if last_step == -1 else begin + last_step + 1
        self._span = end - begin
        self._in_range = -1
        self._chain = chain_of(own, param_name)
        self._chain.begin(resumed=last_step != -1)
        self._chain.links.append(self)
        self._move_to(self.position)

    @abstractmethod
    def transform(self, value: float, initial: float) -> float:
        """Return the value of a group at ``last_step``, the position counted from ``begin``.

        Args:
            value: the result of the previous schedulers in the chain.
            initial: the initial value of the group.
        """

    def transform_group(self, value: float, initial: float, ratio: float, number: int) -> float:
        """Return the value of one group; by default ``transform(value, initial)``.

        Args:
            value: the result of the previous schedulers in the chain.
            initial: the initial value of the group.
            ratio: ``initial`` relative to the optimizer's own value, such as the group's ``lr_mult``; 0 for a frozen group.
            number: the index of the group.
        """
        del ratio, number
        return self.transform(value, initial)

    @property
    def last_step(self) -> int:
        """The current position counted from ``begin``: -1 before the range, and the last position in the range after it."""
        return self._in_range

    def step(self, count: int = 1) -> None:
        """Advance by ``count`` positions and set the new values in the parameter groups."""
        self._move_to(self.position + count)

    def get_last_value(self) -> list[float]:
        """Return the current value of each parameter group."""
        return self._chain.values()

    def describe(self) -> dict[str, Any]:
        """Return the settings that determine the values, without the position. Subclasses add their settings."""
        return {
            "type": type(self).__name__, "param_name": self.param_name,
            "begin": self.begin, "end": self.end, "by": self.unit,
        }  # fmt: skip

    def differences(self, state_dict: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from a saved state: ``{name: (saved value, current value)}``."""
        saved, own = flatten_description(state_dict.get("description", {})), flatten_description(self.describe())
        return {name: (saved[name], own.get(name)) for name in saved if saved[name] != own.get(name)}

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the settings."""
        return {"_global_step": self.position, "last_step": self.last_step, "description": self.describe()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the position and the settings, and set the values in the groups. The argument is not modified.

        The saved range, unit and settings replace the constructor's values. A state without them, such as one written by
        another program, restores only the position.

        Raises:
            CheckpointMismatchError: if the state belongs to a different type of scheduler.
        """
        if "_global_step" not in state_dict:
            raise CheckpointMismatchError(
                f"{type(self).__name__}: the saved state has no position; its keys are {sorted(state_dict)}. "
                "It may be the state of a different scheduler."
            )
        description = state_dict.get("description")
        if description is not None:
            self._restore_settings(description)
        self.started = False
        self._in_range = -1
        self._chain.follow_loaded_values()
        self._move_to(state_dict["_global_step"])
        self._chain.apply()

    def _restore_settings(self, description: Mapping[str, Any]) -> None:
        """Restore the settings of a saved scheduler. Subclasses extend this method."""
        for name in ("type", "param_name"):
            own = self.describe()[name]
            if description[name] != own:
                raise CheckpointMismatchError(
                    f"The scheduler in the checkpoint has {name}={description[name]!r}, but the scheduler of this run "
                    f"has {own!r}. Build the same scheduler, or set resume_param_scheduler=False to use this run's "
                    "configuration."
                )
        self.begin, self.end, self.unit = description["begin"], description["end"], description["by"]
        self.by_epoch = self.unit == "epoch"
        self._span = self.end - self.begin

    @classmethod
    def in_iterations(cls, options: Mapping[str, Any], epoch_length: int) -> dict[str, Any]:
        """Convert the arguments of an epoch-based scheduler to arguments of the equivalent iteration-based one.

        Raises:
            ConfigValueError: if the arguments are not epoch-based, or ``epoch_length`` is not a positive integer.
        """
        if unit_of(options.get("by"), by_epoch=options.get("by_epoch", True)) != "epoch":
            raise ConfigValueError(f"{cls.__name__}: only an epoch-based scheduler can be converted to iterations.")
        if not isinstance(epoch_length, int) or epoch_length < 1:
            raise ConfigValueError(
                f"{cls.__name__}: converting to iterations requires epoch_length, the number of iterations per epoch, "
                f"got {epoch_length!r}."
            )
        converted = {key: value for key, value in options.items() if key != "by"}
        for key in (*cls.counted_arguments, "begin", "end"):
            value = converted.get(key)
            if value is not None and value != FOREVER:
                is_list = isinstance(value, list | tuple)
                converted[key] = [each * epoch_length for each in value] if is_list else value * epoch_length
        return {**converted, "by_epoch": False}

    @classmethod
    def build_iter_from_epoch(
        cls, optimizer: Optimizer | BaseOptimWrapper, *args: Any, epoch_length: int, **kwargs: Any
    ) -> Self:
        """Build an iteration-based scheduler from arguments in epochs."""
        options = inspect.signature(cls).bind_partial(optimizer, *args, **kwargs).arguments
        del options["optimizer"]
        return cls(optimizer, **cls.in_iterations(options, epoch_length))

    def _move_to(self, position: int) -> None:
        self.position = position
        at = position - self.begin
        last = self._span - 1
        if at < 0 or self._in_range == last:
            return
        self._in_range = at if at < last else last
        entered, self.started = not self.started, True
        if self._update_shape() or entered:
            self._chain.apply()
            if self.verbose:
                logger.info("%s: %s %d, %s", type(self).__name__, self.unit, position, self.get_last_value())

    def _update_shape(self) -> bool:
        """Compute the part of the value that all groups share at the new position; return whether it changed."""
        return True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.param_name}, {self.unit} {self.position}, "
            f"range [{self.begin}, {self.end if self.end < FOREVER else 'forever'}))"
        )


def flatten_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flattened copy of a description with tuples instead of lists, so that two descriptions can be compared."""
    values: dict[str, Any] = {}
    for name, value in description.items():
        values |= flatten_description(value) if isinstance(value, Mapping) else {name: value}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def unit_of(by: str | None, *, by_epoch: bool) -> Unit:
    """Return the unit specified by ``by``, or by ``by_epoch`` if ``by`` is None."""
    if by is None:
        return "epoch" if by_epoch else "iter"
    if by not in _UNITS:
        raise ConfigValueError(f"Unknown by={by!r}. {did_you_mean(by, _UNITS)}")
    if by == "epoch" and not by_epoch:
        raise ConfigValueError("by='epoch' conflicts with by_epoch=False. Set only one of them.")
    return cast("Unit", by)
