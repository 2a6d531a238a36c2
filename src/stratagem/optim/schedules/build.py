"""Build parameter schedulers from configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.mixed import MixedOptimizer, parts_of
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
    """Build the schedulers of a run: a list for one optimizer, or a dict of lists for an ``OptimWrapperDict``.

    A mapping from optimizer names to specifications sets the schedulers of each optimizer. Otherwise, each
    configuration is built for every optimizer, and a scheduler that is already built is used for its optimizer. A
    scheduler without ``end`` ends at the end of the run. For a ``MixedOptimizer``, each configuration is built for every part,
    or for the part that it names under ``part``.

    Args:
        spec: a scheduler, a configuration, or a sequence of them.
        optim: the optimizer wrapper, or an ``OptimWrapperDict``.
        max_epochs: the number of epochs in the run.
        max_iters: the number of iterations (micro-batches) in the run.
        epoch_length: the number of iterations per epoch, for ``convert_to_iter_based=True``.
        max_steps: the number of optimizer updates in the run; by default ``max_iters`` divided by the number of
            micro-batches per update.

    Raises:
        ConfigTypeError: if an item is neither a scheduler nor a configuration.
        ConfigValueError: if a required length is unknown, or a built scheduler belongs to a different optimizer or is
            given twice.
        ConfigKeyError: if a mapping has an unknown optimizer name or lacks an optimizer, or a part is unknown.
    """
    run_length = {"epoch": max_epochs, "iter": max_iters, "step": max_steps}
    wrappers = dict(optim.items()) if isinstance(optim, OptimWrapperDict) else {"": optim}
    by_name = _by_optimizer(spec, optim) if isinstance(optim, OptimWrapperDict) else {"": _as_list(spec)}
    _check_owners(by_name, wrappers)
    with ExitStack() as stack:
        for wrapper in wrappers.values():
            for part in parts_of(wrapper.optimizer).values():
                stack.enter_context(all_or_none(part))
        built = {
            name: [
                scheduler
                for item in by_name[name]
                for scheduler in _build_for_parts(item, wrapper, run_length, epoch_length)
            ]
            for name, wrapper in wrappers.items()
        }
    return built if isinstance(optim, OptimWrapperDict) else built[""]


def _by_optimizer(spec: Any, optim: OptimWrapperDict) -> dict[str, list[Any]]:
    """Return a mapping from optimizer names to their schedulers and configurations."""
    if not isinstance(spec, Mapping) or "type" in spec:
        items = _as_list(spec)
        owners = {id(item): _owner_of(item, dict(optim.items())) for item in items if isinstance(item, ParamScheduler)}
        unowned = [item for item in items if id(item) in owners and owners[id(item)] is None]
        if unowned:
            raise _wrong_optimizer(unowned[0], "an optimizer of this run", None)
        return {name: [item for item in items if owners.get(id(item), name) == name] for name in optim}
    for name in spec:
        if name not in optim:
            raise ConfigKeyError(f"param_scheduler: unknown optimizer {name!r}. {did_you_mean(name, optim)}")
    missing = [name for name in optim if name not in spec]
    if missing:
        raise ConfigKeyError(
            f"param_scheduler: the optimizer {missing[0]!r} has no entry. Add a scheduler, or {missing[0]}=[] for no "
            "schedulers."
        )
    return {name: _as_list(spec[name]) for name in optim}


def _as_list(spec: Any) -> list[Any]:
    return list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]


def _check_owners(by_name: Mapping[str, list[Any]], wrappers: Mapping[str, BaseOptimWrapper]) -> None:
    """Check that each scheduler object belongs to its optimizer and is given only once.

    Raises:
        ConfigValueError: if the check fails.
    """
    seen: set[int] = set()
    for name, items in by_name.items():
        for item in items:
            if not isinstance(item, ParamScheduler):
                continue
            if not _is_scheduled_by(wrappers[name], item):
                where = f"the optimizer {name!r}" if name else "the optimizer of this run"
                raise _wrong_optimizer(item, where, _owner_of(item, wrappers))
            if id(item) in seen:
                raise ConfigValueError(
                    f"param_scheduler: {item!r} is given twice and would advance twice. Remove one, or build a second "
                    "scheduler."
                )
            seen.add(id(item))


def _owner_of(schedule: ParamScheduler, wrappers: Mapping[str, BaseOptimWrapper]) -> str | None:
    """Return the name of the optimizer that a scheduler changes; None if it changes none of them."""
    return next((name for name, wrapper in wrappers.items() if _is_scheduled_by(wrapper, schedule)), None)


def _is_scheduled_by(wrapper: BaseOptimWrapper, schedule: ParamScheduler) -> bool:
    """Return whether a scheduler changes this optimizer. Parameter groups are compared, because engines wrap the optimizer."""
    return any(changed is group for changed in schedule.optimizer.param_groups for group in wrapper.param_groups)


def _wrong_optimizer(schedule: ParamScheduler, where: str, owner: str | None) -> ConfigValueError:
    built_on = f"the optimizer {owner!r}" if owner else f"another {type(schedule.optimizer).__name__}"
    return ConfigValueError(
        f"param_scheduler: {schedule!r} was built on {built_on}, not on {where}, so it would have no effect. Build it "
        "on the correct optimizer, or pass its configuration."
    )


def _build_for_parts(
    item: Any, optim: BaseOptimWrapper, run_length: Mapping[str, int | None], epoch_length: int | None
) -> list[ParamScheduler]:
    """Return a scheduler for each part of a ``MixedOptimizer`` that a configuration applies to; otherwise a single one."""
    if isinstance(item, ParamScheduler):
        return [item]
    parts = optim.optimizer.parts if isinstance(optim.optimizer, MixedOptimizer) else {}
    if parts and isinstance(item, Mapping) and "type" not in item:
        raise ConfigValueError(
            f"param_scheduler: a schedule with the keys {', '.join(map(str, item))} has no type. The schedules for the parts of "
            f"a MixedOptimizer are a list, in which each one may name a part: [dict(type=..., part={next(iter(parts))!r}), ...]."
        )
    if isinstance(item, Mapping) and "part" in item:
        part = item["part"]
        if part not in parts:
            raise ConfigKeyError(
                f"param_scheduler: part={part!r} is unknown. {did_you_mean(str(part), parts)}"
                if parts
                else f"param_scheduler: part={part!r} requires a MixedOptimizer, and the optimizer is "
                f"{type(optim.optimizer).__name__}. Omit part."
            )
        item = {key: value for key, value in item.items() if key != "part"}
        parts = {part: parts[part]}
    owners: list[BaseOptimWrapper | Optimizer] = [*parts.values()] or [optim]
    return [_build_one(item, owner, optim, run_length, epoch_length) for owner in owners]


def _build_one(
    item: Any,
    owner: BaseOptimWrapper | Optimizer,
    optim: BaseOptimWrapper,
    run_length: Mapping[str, int | None],
    epoch_length: int | None,
) -> ParamScheduler:
    if isinstance(item, LRScheduler):
        raise _torch_scheduler(type(item))
    if not isinstance(item, Mapping):
        raise ConfigTypeError(
            f"A parameter scheduler must be a ParamScheduler or a mapping with a type, got {type(item).__name__}: {item!r}."
        )
    options = dict(item)
    built_type = _type_of(options)
    if isinstance(built_type, type) and issubclass(built_type, LRScheduler):
        raise _torch_scheduler(built_type)
    convert = options.pop("convert_to_iter_based", False)
    if options.get("end") is None:
        options["end"] = _length_of_run(options, optim, run_length)
    if convert:
        if epoch_length is None:
            raise ConfigValueError(
                f"{item!r}: convert_to_iter_based requires epoch_length, the number of iterations per epoch."
            )
        options = _scheduler_type(options).in_iterations(options, epoch_length)
    built: ParamScheduler = PARAM_SCHEDULERS.build(options, default_args={"optimizer": owner})
    return built


def _scheduler_type(options: Mapping[str, Any]) -> type[ParamScheduler]:
    """Return the scheduler class of a configuration."""
    found = _type_of(options)
    if isinstance(found, type) and issubclass(found, ParamScheduler):
        return found
    raise ConfigTypeError(
        f"convert_to_iter_based requires a parameter scheduler, but type={options.get('type')!r} is not one."
    )


def _type_of(options: Mapping[str, Any]) -> Any:
    """Return what the ``type`` of a configuration refers to."""
    named = options.get("type")
    return PARAM_SCHEDULERS.get(named) if isinstance(named, str) else named


def _torch_scheduler(found: type[LRScheduler]) -> ConfigTypeError:
    name = found.__name__
    own = (
        f"type={name!r}, without torch's module path"
        if name in PARAM_SCHEDULERS
        else "a scheduler from stratagem.optim"
    )
    renamed = " (its eta_max corresponds to torch's max_lr)" if name == "OneCycleLR" else ""
    return ConfigTypeError(
        f"param_scheduler: torch's {name} is not supported, because it overwrites the values of other schedules and the ratios "
        f"of parameter groups. Use {own}{renamed}."
    )


def _length_of_run(options: Mapping[str, Any], optim: BaseOptimWrapper, run_length: Mapping[str, int | None]) -> int:
    """Return the length of the run in the unit of a scheduler."""
    unit = unit_of(options.get("by"), by_epoch=options.get("by_epoch", True))
    length, max_iters = run_length[unit], run_length["iter"]
    if unit == "step" and length is None and max_iters is not None:
        # Round up, because the last accumulation window of a run also makes an update, even if it is shorter.
        length = -(-max_iters // optim.accumulative_counts)
    if length is None:
        raise ConfigValueError(
            f"{options!r} has no end, and the length of the run in {unit}s is unknown. Set end in the scheduler, or "
            f"max_{unit}s in the run."
        )
    return length
