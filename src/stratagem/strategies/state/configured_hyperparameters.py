"""Compare the configured options of optimizers and schedules with a checkpoint, and restore the configured options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, final

from torch import Tensor

from stratagem.optim import BaseOptimWrapper, ParamScheduler
from stratagem.parallel import AnyOptim

__all__ = ["ConfiguredHyperparameters", "move_schedulers", "schedule_differences"]

# The options of a parameter group that users configure. Other options are internal or select an implementation.
_CHOSEN: Final = ("lr", "momentum", "betas", "weight_decay", "eps", "nesterov", "amsgrad", "dampening")
_FIRST: Final = "initial_"


@final
class ConfiguredHyperparameters:
    """Stores the configured options of the parameter groups while a checkpoint's options are loaded.

    Args:
        optim: the optimizer wrapper, after its schedules were built and before a checkpoint is loaded.
    """

    def __init__(self, optim: AnyOptim) -> None:
        self._groups = {name: [_options(group) for group in one.param_groups] for name, one in optim.each().items()}

    def differences(self, optim: AnyOptim) -> list[str]:
        """Return a line for each option whose current value differs from the configured one."""
        lines = []
        for name, wrapper in optim.each().items():
            for number, (own, group) in enumerate(zip(self._groups[name], wrapper.param_groups, strict=True)):
                loaded = _options(group)
                which = f"{name + ': ' if name else ''}parameter group {number}"
                lines += [
                    f"{which}: {key.removeprefix(_FIRST)}={loaded[key]} (this configuration: {own[key]})"
                    for key in own
                    # For a scheduled option, compare the initial value, from which the schedule computes the current one.
                    if key in loaded and loaded[key] != own[key] and f"{_FIRST}{key}" not in own
                ]
        return lines

    def restore(self, optim: AnyOptim) -> None:
        """Restore the configured options of the parameter groups; the state of the parameters is not changed."""
        for name, wrapper in optim.each().items():
            for own, group in zip(self._groups[name], wrapper.param_groups, strict=True):
                for key in [key for key in group if key.startswith(_FIRST) and key not in own]:
                    del group[key]
                for key, value in own.items():
                    if isinstance(group.get(key), Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = value


def move_schedulers(schedulers: Any, optim: AnyOptim, *, epoch: int, iteration: int) -> None:
    """Move the schedules of all optimizers to the given position. Schedules that depend on metrics start from scratch."""
    for name, wrapper in optim.each().items():
        some = schedulers[name] if isinstance(schedulers, Mapping) else schedulers
        _move(some, wrapper, epoch=epoch, iteration=iteration)


def _move(schedulers: Sequence[ParamScheduler], optim: BaseOptimWrapper, *, epoch: int, iteration: int) -> None:
    whole_windows = iteration - iteration % optim.accumulative_counts
    position = {"epoch": epoch, "iter": whole_windows, "step": optim.num_steps_applied}
    for scheduler in schedulers:
        if not scheduler.need_val_args:
            scheduler.load_state_dict({"_global_step": position[scheduler.unit]})


def schedule_differences(schedulers: Any, built: Any) -> Iterator[str]:
    """Yield a line for each schedule whose options differ from the corresponding state in ``built``."""
    if isinstance(schedulers, Mapping):
        for name, some in schedulers.items():
            yield from (f"{name}: {line}" for line in schedule_differences(some, built[name]))
        return
    for scheduler, own_state in zip(schedulers, built, strict=True):
        found = scheduler.differences(own_state)
        if found:
            values = ", ".join(f"{name}={now} (this configuration: {own})" for name, (own, now) in found.items())
            yield f"{type(scheduler).__name__}: {values}"


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: value for key, value in group.items() if key in _CHOSEN or key.startswith(_FIRST)}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in chosen.items()}
