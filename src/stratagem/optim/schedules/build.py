"""From configurations to schedules that are bound to their optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
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

    A mapping keyed by the optimizers' names gives each optimizer its own schedules. In any other form, configurations
    are built for every optimizer, and a built schedule is kept for the optimizer that it was built on. A schedule
    without ``end`` ends with the run, in its own unit.

    Args:
        spec: a built schedule, a configuration, or several of them.
        optim: the wrapper, or the wrappers.
        max_epochs: epochs of the run.
        max_iters: iterations (micro-batches) of the run.
        epoch_length: iterations of an epoch, for ``convert_to_iter_based=True``.
        max_steps: updates of the run; by default ``max_iters`` over the micro-batches of an update.

    Raises:
        ConfigTypeError: if an item is neither a schedule nor a configuration.
        ConfigValueError: if a length is needed and not known, if a built schedule changes an optimizer that is not the
            run's or that has another name, or if a built schedule is given twice.
        ConfigKeyError: if a mapping by optimizer names other optimizers.
    """
    horizon = {"epoch": max_epochs, "iter": max_iters, "step": max_steps}
    wrappers = dict(optim.items()) if isinstance(optim, OptimWrapperDict) else {"": optim}
    if not isinstance(optim, OptimWrapperDict):
        with all_or_none(optim.optimizer):
            items = _as_list(spec)
            _check_owners({"": items}, wrappers)
            return [_build_one(item, optim, horizon, epoch_length) for item in items]
    by_name = _by_optimizer(spec, optim)
    _check_owners(by_name, wrappers)
    with ExitStack() as stack:
        for name in optim:
            stack.enter_context(all_or_none(optim[name].optimizer))
        return {
            name: [_build_one(item, optim[name], horizon, epoch_length) for item in by_name[name]] for name in optim
        }


def _by_optimizer(spec: Any, optim: OptimWrapperDict) -> dict[str, list[Any]]:
    """Return the schedules and configurations of each optimizer, by its name."""
    if not isinstance(spec, Mapping) or "type" in spec:
        items = _as_list(spec)
        owners = {id(item): _owner_of(item, dict(optim.items())) for item in items if isinstance(item, ParamScheduler)}
        foreign = [item for item in items if id(item) in owners and owners[id(item)] is None]
        if foreign:
            raise _foreign(foreign[0], "those of this run", None)
        return {name: [item for item in items if owners.get(id(item), name) == name] for name in optim}
    for name in spec:
        if name not in optim:
            raise ConfigKeyError(f"param_scheduler: there is no optimizer {name!r}. {did_you_mean(name, optim)}")
    missing = [name for name in optim if name not in spec]
    if missing:
        raise ConfigKeyError(
            f"param_scheduler: nothing is said about the optimizer {missing[0]!r}. "
            f"Give it a schedule, or {missing[0]}=[]."
        )
    return {name: _as_list(spec[name]) for name in optim}


def _as_list(spec: Any) -> list[Any]:
    return list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]


def _check_owners(by_name: Mapping[str, list[Any]], wrappers: Mapping[str, BaseOptimWrapper]) -> None:
    """Refuse built schedules that another optimizer owns, and those that are given twice: they would advance twice.

    Raises:
        ConfigValueError: if there is such a schedule.
    """
    seen: set[int] = set()
    for name, items in by_name.items():
        for item in items:
            if not isinstance(item, ParamScheduler):
                continue
            if not _is_scheduled_by(wrappers[name], item):
                where = f"the optimizer {name!r}" if name else "the optimizer of this run"
                raise _foreign(item, where, _owner_of(item, wrappers))
            if id(item) in seen:
                raise ConfigValueError(
                    f"param_scheduler: {item!r} is given twice, so it would advance twice. Give it once, or build a second one."
                )
            seen.add(id(item))


def _owner_of(schedule: ParamScheduler, wrappers: Mapping[str, BaseOptimWrapper]) -> str | None:
    """Return the name of the optimizer whose groups a built schedule changes; None if none of them."""
    return next((name for name, wrapper in wrappers.items() if _is_scheduled_by(wrapper, schedule)), None)


def _is_scheduled_by(wrapper: BaseOptimWrapper, schedule: ParamScheduler) -> bool:
    """Return whether a schedule changes this optimizer: by its groups, since an engine puts its own optimizer around one."""
    return any(changed is group for changed in schedule.optimizer.param_groups for group in wrapper.param_groups)


def _foreign(schedule: ParamScheduler, where: str, owner: str | None) -> ConfigValueError:
    built_on = f"the optimizer {owner!r}" if owner else f"another {type(schedule.optimizer).__name__}"
    return ConfigValueError(
        f"param_scheduler: {schedule!r} was built on {built_on}, not on {where}, so it would change nothing there. Build it "
        "on the optimizer that it is for, or give its configuration."
    )


def _build_one(
    item: Any, optim: BaseOptimWrapper, horizon: Mapping[str, int | None], epoch_length: int | None
) -> ParamScheduler:
    if isinstance(item, ParamScheduler):
        return item
    if not isinstance(item, Mapping):
        raise ConfigTypeError(
            f"A parameter schedule must be built, or a mapping with a type, got {type(item).__name__}: {item!r}. Schedulers "
            "of torch.optim.lr_scheduler are not supported; stratagem.optim has schedules of the same names."
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
