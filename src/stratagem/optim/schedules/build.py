"""From configurations to schedules that are bound to their optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.many import OptimWrapperDict
from stratagem.optim.schedules.base import ParamScheduler, unit_of
from stratagem.optim.schedules.chain import all_or_none
from stratagem.registry import PARAM_SCHEDULERS
from stratagem.utils.names import did_you_mean

__all__ = ["ParamSchedulers", "build_param_schedulers"]

ParamSchedulers: TypeAlias = list[ParamScheduler] | dict[str, list[ParamScheduler]]


def build_param_schedulers(
    spec: ParamScheduler | Mapping[str, Any] | Sequence[ParamScheduler | Mapping[str, Any]],
    optim: BaseOptimWrapper | OptimWrapperDict,
    *,
    max_epochs: int | None = None,
    max_iters: int | None = None,
    epoch_length: int | None = None,
    max_steps: int | None = None,
) -> ParamSchedulers:
    """Build the schedules of a run: a list for one optimizer, name to list for an ``OptimWrapperDict``.

    A mapping keyed by the optimizers' names gives each its own; any other form is used for every optimizer. What is
    built already is kept as it is. A schedule without ``end`` ends with the run, in its own unit.

    Args:
        spec: a built schedule, a configuration, or several of them.
        optim: the wrapper, or the wrappers.
        max_epochs: epochs of the run.
        max_iters: iterations (micro-batches) of the run.
        epoch_length: iterations of an epoch, for ``convert_to_iter_based=True``.
        max_steps: updates of the run; by default ``max_iters`` over the micro-batches of an update.

    Raises:
        ConfigTypeError: if an item is neither a schedule nor a configuration.
        ConfigValueError: if a length is needed and not known.
        ConfigKeyError: if a mapping by optimizer names other optimizers.
    """
    horizon = {"epoch": max_epochs, "iter": max_iters, "step": max_steps}
    if not isinstance(optim, OptimWrapperDict):
        with all_or_none(optim.optimizer):
            return _build_list(spec, optim, horizon, epoch_length)
    by_name = _by_optimizer(spec, optim)
    with ExitStack() as stack:
        for name in optim:
            stack.enter_context(all_or_none(optim[name].optimizer))
        return {name: _build_list(by_name[name], optim[name], horizon, epoch_length) for name in optim}


def _by_optimizer(spec: Any, optim: OptimWrapperDict) -> Mapping[str, Any]:
    if not isinstance(spec, Mapping) or "type" in spec:
        return dict.fromkeys(optim, spec)
    for name in spec:
        if name not in optim:
            raise ConfigKeyError(f"param_scheduler: there is no optimizer {name!r}. {did_you_mean(name, optim)}")
    missing = [name for name in optim if name not in spec]
    if missing:
        raise ConfigKeyError(
            f"param_scheduler: nothing is said about the optimizer {missing[0]!r}. "
            f"Give it a schedule, or {missing[0]}=[]."
        )
    return spec


def _build_list(
    spec: Any, optim: BaseOptimWrapper, horizon: Mapping[str, int | None], epoch_length: int | None
) -> list[ParamScheduler]:
    items = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    return [_build_one(item, optim, horizon, epoch_length) for item in items]


def _build_one(
    item: Any, optim: BaseOptimWrapper, horizon: Mapping[str, int | None], epoch_length: int | None
) -> ParamScheduler:
    if isinstance(item, ParamScheduler):
        return item
    if not isinstance(item, Mapping):
        raise ConfigTypeError(
            f"A parameter schedule must be built, or a mapping with a type, got {type(item).__name__}: {item!r}."
        )
    options = dict(item)
    convert = options.pop("convert_to_iter_based", False)
    if options.get("end") is None:
        options["end"] = _length_of_run(options, optim, horizon)
    if convert:
        if epoch_length is None:
            raise ConfigValueError(f"{item!r}: convert_to_iter_based needs epoch_length, the iterations of an epoch.")
        options = _scheduler_type(options).in_iterations(options, epoch_length)
    built: ParamScheduler = PARAM_SCHEDULERS.build(options, default_args={"optimizer": optim})
    return built


def _scheduler_type(options: Mapping[str, Any]) -> type[ParamScheduler]:
    """Return the class that a configuration names; the registry says what is wrong where it names none."""
    named = options.get("type")
    found = PARAM_SCHEDULERS.get(named) if isinstance(named, str) else named
    if isinstance(found, type) and issubclass(found, ParamScheduler):
        return found
    raise ConfigTypeError(f"convert_to_iter_based is of parameter schedules; type={named!r} is none.")


def _length_of_run(options: Mapping[str, Any], optim: BaseOptimWrapper, horizon: Mapping[str, int | None]) -> int:
    """Return the run's length in the unit of a schedule."""
    unit = unit_of(options.get("by"), by_epoch=options.get("by_epoch", True))
    length, max_iters = horizon[unit], horizon["iter"]
    if unit == "step" and length is None and max_iters is not None:
        # The last window of a run may be shorter, and is an update too.
        length = -(-max_iters // optim.accumulative_counts)
    if length is None:
        raise ConfigValueError(
            f"{options!r} has no end, and the length of the run in {unit}s is not known. Give the schedule an end, or "
            f"the run max_{unit}s."
        )
    return length
