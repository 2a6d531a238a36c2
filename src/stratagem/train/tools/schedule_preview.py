"""Preview the learning rates and other scheduled options of a run without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from stratagem.data import BatchLimits, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import (
    BaseOptimWrapper,
    ParamScheduler,
    build_param_schedulers,
    preview_schedules,
)
from stratagem.optim.optim_wrapper import split_by_part
from stratagem.parallel import AnyOptim
from stratagem.strategies.setup.auto_scale import AutoScale
from stratagem.strategies.setup.building import build_model, build_optim_wrapper
from stratagem.train.building import accumulation_of, loop_arguments
from stratagem.train.hooks.schedule import check_epoch_schedules
from stratagem.train.tools.preserve_state import isolate_rng

__all__ = ["Course", "RunPreview", "preview_run"]

# The number of evenly spaced points, which is larger than the number of columns in a plot.
_POINTS = 2000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The values of an option over a run, for parameter groups that always have the same values.

    Attributes:
        optimizer: the name of the optimizer; empty if there is only one.
        key: the option, such as ``lr``.
        parameters: the names of the parameters.
        whole: whether the group contains all parameters of the optimizer.
        values: the value at each iteration of the preview.
    """

    optimizer: str
    key: str
    parameters: tuple[str, ...]
    whole: bool
    values: NDArray[np.float64]

    @property
    def changes(self) -> bool:
        """Whether the value changes during the run."""
        return bool((self.values != self.values[0]).any())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunPreview:
    """The values of every optimizer's options over a run.

    Attributes:
        iterations: the iterations (micro-batches) of the values, counted from 0, in ascending order.
        max_iters: the total number of iterations.
        epoch_length: the number of iterations of an epoch; None if the data has no length.
        accumulative_counts: a mapping from optimizer names to the number of iterations per optimizer step.
        courses: the values of the options.
        on_metrics: schedules that depend on metrics, as (optimizer, key, class name); their values are constant in a preview.
        scaling: sentences that describe the effect of ``auto_scale_lr``; empty if it is not enabled.
    """

    iterations: NDArray[np.int64]
    max_iters: int
    epoch_length: int | None
    accumulative_counts: Mapping[str, int]
    courses: tuple[Course, ...]
    on_metrics: tuple[tuple[str, str, str], ...] = ()
    scaling: tuple[str, ...] = ()


def preview_run(
    model: nn.Module | Mapping[str, Any],
    *,
    optim_wrapper: Mapping[str, Any],
    train_dataloader: DataLoader[Any] | Mapping[str, Any],
    train_cfg: Mapping[str, Any],
    param_scheduler: Any = None,
    auto_scale_lr: Mapping[str, Any] | None = None,
    world_size: int = 1,
    limits: BatchLimits | None = None,
) -> RunPreview:
    """Return the values of the scheduled options over a run.

    Nothing is trained or written. The model is built on the meta device, which takes no memory, or on the CPU if that is
    not possible; the dataset is built to get its length. Random states are restored.

    Args:
        model: a model or its configuration. This and the following arguments are as for :class:`~stratagem.Runner`.
        optim_wrapper: the configuration of the optimizer wrapper. A built one is rejected, since it would be modified.
        train_dataloader: determines the number of iterations of an epoch.
        train_cfg: determines the length of the run.
        param_scheduler: the schedules; None for none.
        auto_scale_lr: as for a strategy.
        world_size: the number of processes of the run, which share the samples of the dataset.
        limits: the limits of the number of batches; None if there are none.

    Raises:
        ConfigError: (or a subclass) if a component cannot be built or the length of the run is unknown.
    """
    if not isinstance(optim_wrapper, Mapping):
        raise ConfigTypeError(
            f"A preview modifies the optimizer, so optim_wrapper must be a configuration, got {type(optim_wrapper).__name__}."
        )
    with isolate_rng():
        limit = None if limits is None else limits.of("train")
        loader = build_dataloader(train_dataloader, seed=0, world_size=world_size, training=True, limit=limit)
        max_epochs, max_iters = _length(train_cfg, loader.length, accumulation_of(optim_wrapper))
        module, optim = _build(model, optim_wrapper)
    scale = AutoScale.parse(auto_scale_lr)
    if scale is not None and loader.batch_size is None:
        raise ConfigValueError("auto_scale_lr needs the batch size, but the train_dataloader has none.")
    scaling = [] if scale is None else scale.apply(optim, world_size=world_size, micro_batch=loader.batch_size or 1)
    built = build_param_schedulers(
        [] if param_scheduler is None else param_scheduler,
        optim,
        max_epochs=max_epochs,
        max_iters=max_iters,
        epoch_length=loader.length,
    )
    wrappers = optim.each()
    schedulers = built if isinstance(built, dict) else {"": built}
    everything = [each for some in schedulers.values() for each in some]
    check_epoch_schedules(everything, max_epochs)
    counts = [each.accumulative_counts for name, each in wrappers.items() for _ in schedulers[name]]
    iterations = _iterations(max_iters, list(zip(everything, counts, strict=True)), loader.length or 1)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    courses: list[Course] = []
    for name, wrapper in wrappers.items():
        for part, own in split_by_part(wrapper, name).items():
            some = [each for each in schedulers[name] if own is wrapper or each.optimizer is own.optimizer]
            shown = preview_schedules(own, some, iterations.tolist(), epoch_length=loader.length)
            courses += _courses(part, own, shown, names)
    return RunPreview(
        iterations=iterations,
        max_iters=max_iters,
        epoch_length=loader.length,
        accumulative_counts={name: wrapper.accumulative_counts for name, wrapper in wrappers.items()},
        courses=tuple(courses),
        on_metrics=tuple(
            (part, each.param_name, type(each).__name__)
            for name, wrapper in wrappers.items()
            for part, own in split_by_part(wrapper, name).items()
            for each in schedulers[name]
            if each.need_val_args and (own is wrapper or each.optimizer is own.optimizer)
        ),
        scaling=tuple(scaling),
    )


def _length(train_cfg: Mapping[str, Any], epoch_length: int | None, accumulation: int) -> tuple[int | None, int]:
    """Return the number of epochs (None if the run is not measured in epochs) and of iterations."""
    cfg = loop_arguments(train_cfg)
    max_epochs, max_iters = cfg.get("max_epochs"), cfg.get("max_iters")
    if max_epochs is not None and epoch_length is not None:
        max_iters = max_epochs * epoch_length
    elif "max_steps" in cfg:
        max_iters = cfg["max_steps"] * accumulation
    if not isinstance(max_iters, int) or max_iters < 1:
        raise ConfigValueError(
            f"The number of iterations of the run is unknown: train_cfg is {cfg!r}, and the epoch length is {epoch_length}. "
            "Set max_iters in train_cfg, or set max_epochs and use data with a length."
        )
    return max_epochs, max_iters


def _build(model: nn.Module | Mapping[str, Any], optim_wrapper: Mapping[str, Any]) -> tuple[nn.Module, AnyOptim]:
    try:
        with torch.device("meta"):
            module = build_model(model)
            return module, build_optim_wrapper(optim_wrapper, module)
    except (RuntimeError, TypeError, ValueError):
        # A model that reads its weights during construction cannot be built on the meta device. Any other error is raised
        # again here.
        module = build_model(model)
        return module, build_optim_wrapper(optim_wrapper, module)


def _iterations(
    max_iters: int, schedulers: Sequence[tuple[ParamScheduler, int]], epoch_length: int
) -> NDArray[np.int64]:
    """Return evenly spaced iterations, and the iterations around the beginning and end of each schedule.

    Each schedule comes with the number of micro-batches per optimizer step.
    """
    spread = np.linspace(0, max_iters - 1, min(max_iters, _POINTS)).round().astype(np.int64)
    edges = np.asarray(
        [edge for each, count in schedulers for edge in _edges(each, count, epoch_length)], dtype=np.int64
    )
    return np.unique(np.concatenate([spread, edges[(edges >= 0) & (edges < max_iters)]]))


def _edges(scheduler: ParamScheduler, accumulative_counts: int, epoch_length: int) -> Iterator[int]:
    unit = {"epoch": epoch_length, "iter": 1, "step": accumulative_counts}[scheduler.unit]
    for position in (scheduler.begin, scheduler.end - 1, scheduler.end):
        yield from (position * unit - 1, position * unit)


def _courses(
    optimizer: str,
    wrapper: BaseOptimWrapper,
    shown: Mapping[str, NDArray[np.float64]],
    names: Mapping[int, str],
) -> Iterator[Course]:
    """Yield the courses of each option. Parameter groups whose values are always equal share a course."""
    groups = [
        tuple(names.get(id(each), "an unnamed parameter") for each in group["params"]) for group in wrapper.param_groups
    ]
    for key, values in shown.items():
        alike: dict[bytes, list[int]] = {}
        for number in range(len(groups)):
            alike.setdefault(values[:, number].tobytes(), []).append(number)
        for numbers in alike.values():
            yield Course(
                optimizer=optimizer,
                key=key,
                parameters=tuple(name for number in numbers for name in groups[number]),
                whole=len(alike) == 1,
                values=values[:, numbers[0]],
            )
