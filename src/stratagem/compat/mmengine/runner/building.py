"""Build the components of a run from MMEngine's configurations, with the registries of this layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dataset import worker_init_fn as default_worker_init_fn
from stratagem.compat.mmengine.dist import get_rank, get_world_size
from stratagem.compat.mmengine.evaluator import Evaluator
from stratagem.compat.mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler, build_optim_wrapper
from stratagem.compat.mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    LOG_PROCESSORS,
    LOOPS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
)
from stratagem.compat.mmengine.runner.base_loop import BaseLoop
from stratagem.compat.mmengine.runner.log_processor import LogProcessor
from stratagem.compat.mmengine.runner.positioned_loader import PositionedLoader
from stratagem.compat.mmengine.runner.utils import _get_batch_size
from stratagem.errors import ConfigValueError

__all__ = [
    "build_dataloader",
    "build_evaluator",
    "build_log_processor",
    "build_loop",
    "build_optim",
    "build_schedulers",
    "check_scheduler_cfg",
    "random_numbers",
]


class _SlicedDataset:
    """The first samples of a dataset; all other attributes are those of the dataset.

    Args:
        dataset: the dataset.
        length: the number of samples.
    """

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset = dataset
        self._length = length

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return self._length


_uses_global_random_numbers: ContextVar[bool] = ContextVar("uses_global_random_numbers", default=False)


@contextmanager
def random_numbers(*, global_: bool) -> Iterator[None]:
    """Set whether data loaders that are built in the context use the global generators; see :class:`PositionedLoader`.

    ``Runner.build_dataloader``, which loops call, is a static method, so it does not know the options of the run.
    """
    token = _uses_global_random_numbers.set(global_)
    try:
        yield
    finally:
        _uses_global_random_numbers.reset(token)


def build_dataloader(dataloader: Any, *, seed: int | None, diff_rank_seed: bool) -> DataLoader[Any]:
    """Build a data loader with the samplers, functions and defaults of MMEngine; a ``DataLoader`` is returned as it is.

    Args:
        dataloader: the loader or its configuration.
        seed: the seed of the sampler and of the random numbers of the samples.
        diff_rank_seed: whether the ranks have different seeds. The sampler then draws a common one. Collective in this case.

    Raises:
        TypeError: if a function has the wrong type.
        KeyError: if there is no ``dataset`` or ``sampler``.
    """
    if isinstance(dataloader, DataLoader):
        return dataloader
    cfg = copy.deepcopy(dict(dataloader))
    dataset = cfg.pop("dataset")
    if isinstance(dataset, Mapping):
        dataset = DATASETS.build(dataset)
        if hasattr(dataset, "full_init"):
            dataset.full_init()
    num_batches = cfg.pop("num_batch_per_epoch", None)
    if num_batches is not None:
        dataset = _SlicedDataset(dataset, num_batches * _get_batch_size(cfg) * get_world_size())
    sampler = cfg.pop("sampler")
    if isinstance(sampler, Mapping):
        arguments = {"dataset": dataset, "seed": None if diff_rank_seed else seed}
        sampler = DATA_SAMPLERS.build(sampler, default_args=arguments)
    batch_sampler = cfg.pop("batch_sampler", None)
    if isinstance(batch_sampler, Mapping):
        arguments = {"sampler": sampler, "batch_size": cfg.pop("batch_size")}
        batch_sampler = DATA_SAMPLERS.build(batch_sampler, default_args=arguments)
    quiet = cfg.pop("disable_subprocess_warning", False)
    require(isinstance(quiet, bool), f"disable_subprocess_warning must be a bool, got {type(quiet).__name__}.")
    if "worker_init_fn" in cfg:
        init_fn = _function(cfg.pop("worker_init_fn"), "worker_init_fn")
    elif seed is not None:
        init_fn = partial(
            default_worker_init_fn,
            num_workers=cfg.get("num_workers", 0),
            rank=get_rank(),
            seed=seed,
            disable_subprocess_warning=quiet,
        )
    else:
        init_fn = None
    collate_fn = _function(cfg.pop("collate_fn", {"type": "pseudo_collate"}), "collate_fn")
    return PositionedLoader(
        seed=0 if seed is None else seed,
        global_random_numbers=_uses_global_random_numbers.get(),
        dataset=dataset,
        sampler=sampler if batch_sampler is None else None,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        worker_init_fn=init_fn,
        **cfg,
    )


def _function(cfg: Any, name: str) -> Any:
    """Return a function, or build it from a configuration with a ``type`` and its arguments."""
    if not isinstance(cfg, Mapping):
        if callable(cfg):
            return cfg
        raise TypeError(f"{name} should be a dict or callable object, but got {cfg!r}")
    arguments = dict(cfg)
    kind = arguments.pop("type")
    target = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    if not callable(target):
        raise TypeError(f"The type of {name} should be the name of a registered function or callable, but got {kind!r}")
    return partial(target, **arguments)


def build_evaluator(evaluator: Any) -> Evaluator:
    """Return an evaluator, or build it from its configuration or those of its metrics.

    Raises:
        TypeError: if it has the wrong type.
    """
    if isinstance(evaluator, Evaluator):
        return evaluator
    if isinstance(evaluator, Mapping) and "metrics" in evaluator:
        built: Evaluator = EVALUATOR.build({"type": "Evaluator", **evaluator})
        return built
    if isinstance(evaluator, Mapping | list):
        return Evaluator(dict(evaluator) if isinstance(evaluator, Mapping) else evaluator)
    raise TypeError(f"evaluator should be an Evaluator, a dict or a list of dicts, but got {evaluator!r}")


def build_log_processor(log_processor: Any) -> LogProcessor:
    """Return a log processor, or build it from its configuration.

    Raises:
        TypeError: if it has the wrong type.
    """
    if isinstance(log_processor, LogProcessor):
        return log_processor
    if not isinstance(log_processor, Mapping):
        raise TypeError(f"log_processor should be a LogProcessor or a dict, but got {log_processor!r}")
    cfg = copy.deepcopy(dict(log_processor))
    built: LogProcessor = LOG_PROCESSORS.build({"type": "LogProcessor", **cfg})
    return built


def build_loop(loop: Any, kind: str, default: type[BaseLoop] | None, **arguments: Any) -> BaseLoop:
    """Return a loop, or build it from its configuration.

    Args:
        loop: the loop or its configuration.
        kind: its name for messages.
        default: the class if the configuration has no ``type``.
        arguments: the arguments that the configuration may omit.

    Raises:
        TypeError: if it has the wrong type.
    """
    if isinstance(loop, BaseLoop):
        return loop
    if not isinstance(loop, Mapping):
        raise TypeError(f"{kind} should be a loop or a dict, but got {loop!r}")
    cfg = copy.deepcopy(dict(loop))
    if "type" in cfg or default is None:
        built: BaseLoop = LOOPS.build(cfg, default_args=arguments)
        return built
    return default(**{**arguments, **cfg})


def build_optim(optim_wrapper: Any, model: nn.Module) -> Any:
    """Return an optimizer wrapper, or build it from its configuration.

    Raises:
        TypeError: if it has the wrong type.
        ValueError: if a mapping without ``optimizer`` and ``constructor`` contains anything but optimizer wrappers.
    """
    if isinstance(optim_wrapper, OptimWrapper | OptimWrapperDict):
        return optim_wrapper
    if not isinstance(optim_wrapper, Mapping):
        raise TypeError(f"The optimizer wrapper should be an OptimWrapper or a dict, but got {optim_wrapper!r}")
    optimizer = optim_wrapper.get("optimizer")
    if isinstance(optimizer, Optimizer):
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **optim_wrapper})
    if optimizer is not None or "constructor" in optim_wrapper:
        return build_optim_wrapper(model, optim_wrapper)
    for name, wrapper in optim_wrapper.items():
        if not isinstance(wrapper, OptimWrapper):
            raise ConfigValueError(
                "Each item of optim_wrapper must be an OptimWrapper if it has neither optimizer nor constructor, got "
                f"{name}={wrapper!r}."
            )
    return OptimWrapperDict(**optim_wrapper)


def build_schedulers(
    scheduler: Any, optim_wrapper: Any, *, epoch_length: Callable[[], int], ends: tuple[int, int] | None
) -> list[Any] | dict[str, list[Any]]:
    """Return the schedulers of an optimizer: a list, or for several optimizers a dict of lists.

    Args:
        scheduler: schedulers or their configurations.
        optim_wrapper: the optimizer wrapper or wrappers.
        epoch_length: returns the number of iterations of an epoch; called for schedulers that are not built.
        ends: the length of the run in epochs and in iterations, the default of ``end``; None if it is unknown.

    Raises:
        TypeError: if a scheduler has the wrong type.
        AssertionError: if the optimizer wrapper is not built.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        by_name = isinstance(scheduler, Mapping) and "type" not in scheduler
        return {
            name: _schedulers_of_one(scheduler[name] if by_name else scheduler, wrapper, epoch_length, ends)
            for name, wrapper in optim_wrapper.items()
        }
    require(
        isinstance(optim_wrapper, OptimWrapper),
        "build_optim_wrapper should be called before build_param_scheduler, whose schedulers depend on the optimizer.",
    )
    return _schedulers_of_one(scheduler, optim_wrapper, epoch_length, ends)


def _schedulers_of_one(
    scheduler: Any, optim_wrapper: Any, epoch_length: Callable[[], int], ends: tuple[int, int] | None
) -> list[Any]:
    built = []
    for each in scheduler if isinstance(scheduler, Sequence) else [scheduler]:
        if isinstance(each, _ParamScheduler):
            built.append(each)
            continue
        if not isinstance(each, Mapping):
            raise TypeError(f"scheduler must be a _ParamScheduler or a dict, got {each!r}.")
        cfg = copy.deepcopy(dict(each))
        if ends is not None:
            cfg.setdefault("end", ends[0] if cfg.get("by_epoch", True) else ends[1])
        arguments = {"optimizer": optim_wrapper, "epoch_length": epoch_length()}
        built.append(PARAM_SCHEDULERS.build(cfg, default_args=arguments))
    return built


def check_scheduler_cfg(param_scheduler: Any) -> None:
    """Check the type of the argument ``param_scheduler``.

    Raises:
        TypeError: if it is neither a scheduler, a configuration, nor a list or dict of them.
        AssertionError: if an item has no ``type``, or a value of a dict has the wrong type.
    """
    if param_scheduler is None or isinstance(param_scheduler, _ParamScheduler):
        return
    if isinstance(param_scheduler, Mapping):
        values = () if "type" in param_scheduler else param_scheduler.values()
        for value in values:
            require(
                isinstance(value, Mapping | tuple | list | _ParamScheduler),
                f"Each value of param_scheduler should be a dict or a list, but got {value!r}.",
            )
        return
    items = param_scheduler if isinstance(param_scheduler, list | tuple) else None
    if items is None or not all(isinstance(each, Mapping | _ParamScheduler) for each in items):
        raise TypeError(
            f"`param_scheduler` should be a _ParamScheduler, a dict, or a list of them, but got "
            f"{type(param_scheduler).__name__}. For several optimizers, use a dict from their names to the schedulers."
        )
    for each in items:
        require(
            not isinstance(each, Mapping) or "type" in each, f"Each parameter scheduler needs a type, got {each!r}."
        )
