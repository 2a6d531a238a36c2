"""What every schedule of a parameter group's option shares: range, position, state."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self, cast

from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.schedules.chain import chain_of
from stratagem.utils.names import did_you_mean

__all__ = ["FOREVER", "ParamScheduler", "Unit", "unit_of"]

logger = logging.getLogger(__name__)

Unit = Literal["epoch", "iter", "step"]

FOREVER: Final = 10**9
_UNITS: Final = ("epoch", "iter", "step")


class ParamScheduler(ABC):
    """Change one option of every parameter group as a run goes on. Extend it by defining ``transform``.

    Positions ``[begin, end)`` of the run are the schedule's range. Before it the schedule changes nothing; from ``end``
    on it keeps its last transformation. Schedules of the same option of the same optimizer form a chain: each
    transforms what those that were built before it make of the group's first value.

    Args:
        optimizer: the optimizer, or its wrapper.
        param_name: the option, such as ``lr``, ``weight_decay``, or ``momentum``, which is ``betas[0]`` where an
            optimizer has that.
        begin: the first position of the range.
        end: the position after the last of the range.
        last_step: -1 to start; else the last position, counted from ``begin``, that was run before.
        by_epoch: whether positions are epochs or iterations (one ``train_step``, one micro-batch).
        by: the unit by name, with ``"step"`` for updates of the optimizer; ``None`` leaves it to ``by_epoch``.
        verbose: log each change.

    Attributes:
        unit: ``"epoch"``, ``"iter"`` or ``"step"``; whoever runs the loop calls ``step`` accordingly.
        position: positions of the run done so far.
        started: whether the range has begun.

    Raises:
        ConfigTypeError: if the optimizer is none.
        ConfigValueError: if the range is empty, or ``last_step`` or ``by`` is not allowed.
        ConfigKeyError: if a group does not have the option, or, with ``last_step``, no ``initial_<option>``.
    """

    need_val_args: ClassVar[bool] = False
    # Arguments of the constructor that count positions.
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
                f"{type(self).__name__} needs one optimizer or its wrapper, got {type(optimizer).__name__}."
            )
        if not end > begin >= 0:
            raise ConfigValueError(
                f"{type(self).__name__}: begin={begin}, end={end} is no range. Give end > begin >= 0."
            )
        if not isinstance(last_step, int) or last_step < -1:
            raise ConfigValueError(
                f"{type(self).__name__}: last_step must be a whole number from -1, got {last_step!r}."
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
        self._chain = chain_of(optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer, param_name)
        self._chain.begin(resumed=last_step != -1)
        self._chain.links.append(self)
        self._move_to(self.position)

    @abstractmethod
    def transform(self, value: float, initial: float) -> float:
        """Return what a group's value becomes at ``last_step``, the position counted from ``begin``.

        Args:
            value: what the schedules before this one make of the group's first value.
            initial: the group's first value.
        """

    @property
    def last_step(self) -> int:
        """The present position counted from ``begin``: -1 before the range, and the last of the range after it."""
        return self._in_range

    def step(self, count: int = 1) -> None:
        """Go ``count`` positions on and write the values of the new position into the groups."""
        self._move_to(self.position + count)

    def get_last_value(self) -> list[float]:
        """Return the present value of each parameter group."""
        return self._chain.values()

    def describe(self) -> dict[str, Any]:
        """Return what decides its values beside the position: kind, option, range and unit. Derived classes add theirs."""
        return {
            "type": type(self).__name__, "param_name": self.param_name,
            "begin": self.begin, "end": self.end, "by": self.unit,
        }  # fmt: skip

    def differences(self, state_dict: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return by name what differs in a schedule with this state: its value, and that of this one."""
        saved, own = flat(state_dict.get("description", {})), flat(self.describe())
        return {name: (saved[name], own.get(name)) for name in saved if saved[name] != own.get(name)}

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands, and what it is."""
        return {"_global_step": self.position, "last_step": self.last_step, "description": self.describe()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Become the saved schedule at its position, and write its values into the groups; the argument stays as it is.

        Its range, unit and settings are the saved ones, whatever this one was built with; a state without them, as
        other programs write it, leaves them as they are.

        Raises:
            CheckpointMismatchError: if the state is not one of this kind of schedule.
        """
        if "_global_step" not in state_dict:
            raise CheckpointMismatchError(
                f"{type(self).__name__}: the saved state has no position, only {sorted(state_dict)}. "
                "Is it the state of another schedule?"
            )
        description = state_dict.get("description")
        if description is not None:
            self._become(description)
        self.started = False
        self._in_range = -1
        self._move_to(state_dict["_global_step"])
        self._chain.apply()

    def _become(self, description: Mapping[str, Any]) -> None:
        """Take what a saved schedule was; derived classes take theirs."""
        for name in ("type", "param_name"):
            own = self.describe()[name]
            if description[name] != own:
                raise CheckpointMismatchError(
                    f"The checkpoint's schedule has {name}={description[name]!r}, this run's {own!r}. Build the same one, "
                    "or follow the configuration from here on with resume_param_scheduler=False."
                )
        self.begin, self.end, self.unit = description["begin"], description["end"], description["by"]
        self.by_epoch = self.unit == "epoch"
        self._span = self.end - self.begin

    @classmethod
    def in_iterations(cls, options: Mapping[str, Any], epoch_length: int) -> dict[str, Any]:
        """Return the arguments of a schedule by epoch as those of the same one by iteration.

        Raises:
            ConfigValueError: if they are not by epoch, or ``epoch_length`` is no positive whole number.
        """
        if unit_of(options.get("by"), by_epoch=options.get("by_epoch", True)) != "epoch":
            raise ConfigValueError(f"{cls.__name__}: only a schedule by epoch can be converted to iterations.")
        if not isinstance(epoch_length, int) or epoch_length < 1:
            raise ConfigValueError(
                f"{cls.__name__}: converting to iterations needs epoch_length, the iterations of one epoch; "
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
        """Build a schedule that is given in epochs so that it changes at every iteration."""
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
        if self._reshape() or entered:
            self._chain.apply()
            if self.verbose:
                logger.info("%s: %s %d, %s", type(self).__name__, self.unit, position, self.get_last_value())

    def _reshape(self) -> bool:
        """Compute what all groups share at the new position; return whether it changed."""
        return True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.param_name}, {self.unit} {self.position}, "
            f"range [{self.begin}, {self.end if self.end < FOREVER else 'forever'}))"
        )


def flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with what is nested in it at its top, and lists as tuples, so that both forms are equal."""
    values: dict[str, Any] = {}
    for name, value in description.items():
        values |= flat(value) if isinstance(value, Mapping) else {name: value}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def unit_of(by: str | None, *, by_epoch: bool) -> Unit:
    """Return the unit that ``by`` names, or else ``by_epoch``."""
    if by is None:
        return "epoch" if by_epoch else "iter"
    if by not in _UNITS:
        raise ConfigValueError(f"by={by!r} is not known. {did_you_mean(by, _UNITS)}")
    if by == "epoch" and not by_epoch:
        raise ConfigValueError("by='epoch' and by_epoch=False contradict each other. Give one of them.")
    return cast("Unit", by)
