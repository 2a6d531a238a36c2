"""Schedules and hooks that count optimizer steps, so that they do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from stratagem.optim import ParamScheduler
from stratagem.optim.schedules.base import unit_of
from stratagem.registry import PARAM_SCHEDULERS

__all__ = ["StepSchedules", "hooks_in_steps", "schedules_in_steps"]

# Options of EMAHook that refer to epochs.
_EPOCH_OPTIONS: Final = ("by_epoch", "begin_epoch", "update_bn", "update_bn_batches")


@final
@dataclass(frozen=True, slots=True)
class StepSchedules:
    """The configuration of the schedules, and the types of those that were omitted because they cannot count steps."""

    schedules: Any
    omitted: tuple[str, ...] = ()


def schedules_in_steps(spec: Any, epoch_length: int | None, run_length: int) -> StepSchedules:
    """Return the schedules of a configuration such that they count optimizer steps instead of iterations or epochs.

    Schedules that depend on validation metrics, custom schedules without a unit, and schedules that count epochs if the
    length of an epoch is unknown are omitted.

    Args:
        spec: ``param_scheduler`` of a configuration.
        epoch_length: the number of steps per epoch, or None.
        run_length: the number of steps of the configured run, at which schedules without an end have their end.
    """
    if isinstance(spec, Mapping) and "type" not in spec:
        by_name = {name: schedules_in_steps(each, epoch_length, run_length) for name, each in spec.items()}
        omitted = tuple(name for each in by_name.values() for name in each.omitted)
        return StepSchedules({name: each.schedules or [] for name, each in by_name.items()}, omitted)
    items = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [] if spec is None else [spec]
    converted = [(item, _in_steps(item, epoch_length, run_length)) for item in items]
    kept = [options for _, options in converted if options is not None]
    return StepSchedules(kept or None, tuple(_name_of(item) for item, options in converted if options is None))


def _in_steps(item: Any, epoch_length: int | None, run_length: int) -> dict[str, Any] | None:
    if not isinstance(item, Mapping):
        return None
    kind = item.get("type")
    found = PARAM_SCHEDULERS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(found, type) and issubclass(found, ParamScheduler)) or found.need_val_args:
        return None
    options = {key: value for key, value in item.items() if key != "convert_to_iter_based"}
    if unit_of(options.get("by"), by_epoch=options.get("by_epoch", True)) == "epoch":
        if epoch_length is None:
            return None
        options = found.in_iterations(options, epoch_length)
    options = {key: value for key, value in options.items() if key not in ("by", "by_epoch")}
    if options.get("end") is None:
        options["end"] = max(run_length, options.get("begin", 0) + 1)
    return {**options, "by": "step"}


def _name_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else type(item)
    return kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))


def hooks_in_steps(hooks: Any, micro_batches: int) -> list[Any]:
    """Return the custom hooks of a configuration, with an ``EMAHook`` that averages after steps.

    Args:
        hooks: ``custom_hooks`` of a configuration.
        micro_batches: the number of micro-batches per micro-batch of the configuration, which multiplies ``begin_iter``.
    """
    return [
        _average_in_steps(hook, micro_batches) if isinstance(hook, Mapping) and hook.get("type") == "EMAHook" else hook
        for hook in hooks or ()
    ]


def _average_in_steps(hook: Mapping[str, Any], micro_batches: int) -> dict[str, Any]:
    kept = {key: value for key, value in hook.items() if key not in _EPOCH_OPTIONS}
    begin = kept.get("begin_iter")
    return {**kept, "begin_iter": begin * micro_batches} if isinstance(begin, int) and begin > 0 else kept
