"""Loaders from configurations, and from built ones that would not go on exactly by themselves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from stratagem.data.batches import DealtBatches, EpochBatches, ForeignBatches, PositionedBatches
from stratagem.data.collate import pseudo_collate
from stratagem.data.loader import EpochLoader
from stratagem.data.samplers import DefaultSampler, PositionedSampler
from stratagem.data.stateful import Stateful, WatchedStream
from stratagem.data.streams import StreamedDataset, draws_numbers, stream_seed
from stratagem.data.workers import WorkerStart
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from stratagem.utils.data_rules import refuse_data_arguments

__all__ = ["build_dataloader"]


def build_dataloader(
    dataloader: DataLoader[Any] | Mapping[str, Any],
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    training: bool,
) -> EpochLoader:
    """Build a loader from its configuration, or take a built one.

    A built ``DataLoader`` that takes all samples in order or in torch's random order is built anew with the sampler of
    ours that does the same, so that its samples are dealt to the ranks and its order can be taken up anywhere; so is one
    with a sampler of ours, or over a stream. One with another sampler, batch sampler or a generator of its own is taken as it is.

    A mapping holds the arguments of ``torch.utils.data.DataLoader`` with ``dataset``, ``sampler``, ``batch_sampler``,
    ``collate_fn`` and ``worker_init_fn`` as objects or as configurations of their own. Without a sampler it is a
    :class:`DefaultSampler`, which shuffles in training (or as ``shuffle`` says). For evaluation, samplers of ours do
    not fill up, so no sample is counted twice. ``collate_fn`` is ``pseudo_collate`` where not given.

    What a dataset with ``__getitem__``, and ``collate_fn``, draw from the generators of Python, NumPy and torch depends on
    the seed, the epoch and the sample alone. A ``worker_init_fn`` is called, but its seeding is of no consequence.

    Raises:
        ConfigTypeError: if a part has the wrong type.
        ConfigValueError: if there is no dataset, or two parts would choose the samples.
    """
    if isinstance(dataloader, DataLoader):
        if not _is_plain(dataloader):
            return EpochLoader(dataloader, world_size=world_size)
        dataloader = _arguments_of(dataloader)
    if not isinstance(dataloader, Mapping):
        raise ConfigTypeError(f"A dataloader is a DataLoader or a mapping of its arguments, not {dataloader!r}.")
    cfg = dict(dataloader)
    if "dataset" not in cfg:
        raise ConfigValueError(f"A dataloader needs a dataset; it has {', '.join(map(repr, cfg)) or 'nothing'}.")
    dataset = _build_dataset(cfg.pop("dataset"))
    # Torch draws the workers' base seed when an iteration begins: from a generator of the loader's own, so that stopping
    # and going on does not shift the model's random numbers.
    if cfg.get("generator") is None:
        cfg["generator"] = torch.Generator().manual_seed(stream_seed(seed, rank))
    single = cfg.get("batch_size", 1) is None and cfg.get("batch_sampler") is None
    # Without batches there is nothing to collate.
    if "collate_fn" in cfg or not single:
        cfg["collate_fn"] = _build_function(cfg.get("collate_fn", pseudo_collate), "collate_fn")
    then = cfg.get("worker_init_fn")
    cfg["worker_init_fn"] = WorkerStart(seed, rank, None if then is None else _build_function(then, "worker_init_fn"))
    if not isinstance(dataset, IterableDataset):
        dealt = {"rank": rank, "world_size": world_size}
        source = _take_source(cfg, dataset, seed=seed, training=training, dealt=dealt)
        streamed = draws_numbers(dataset, cfg.get("collate_fn"))
        batches = EpochBatches(source, streamed=streamed, single=single)
        cfg |= {"sampler": batches, "batch_size": None} if single else {"batch_sampler": batches}
        if streamed:
            dataset = StreamedDataset(dataset, cfg.get("collate_fn"), seed)
            cfg |= {"collate_fn": _as_it_is} if "collate_fn" in cfg else {}
    elif isinstance(dataset, Stateful) and not cfg.get("num_workers"):
        dataset = WatchedStream(dataset)
    try:
        loader: DataLoader[Any] = DataLoader(dataset, **cfg)
    except (TypeError, ValueError) as error:
        kind = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
        raise kind(f"The dataloader's arguments do not fit torch.utils.data.DataLoader: {error}") from error
    return EpochLoader(loader, world_size=world_size)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader's order is one of ours, or one that our own sampler gives as well."""
    sampler = loader.sampler
    if type(loader) is not DataLoader or loader.generator is not None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    if isinstance(loader.batch_sampler, PositionedBatches):
        return True
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    if isinstance(sampler, PositionedSampler):
        return True
    if getattr(sampler, "data_source", None) is not loader.dataset:
        return False
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return whole and sampler.generator is None
    return type(sampler) is SequentialSampler


def _arguments_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the arguments that make a plain loader like this one."""
    names = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "prefetch_factor", "persistent_workers", "in_order",
    )  # fmt: skip
    arguments = {name: getattr(loader, name) for name in names}
    if isinstance(loader.batch_sampler, PositionedBatches):
        return {**arguments, "batch_sampler": loader.batch_sampler}
    arguments |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if isinstance(loader.dataset, IterableDataset):
        return arguments
    if isinstance(loader.sampler, PositionedSampler):
        return {**arguments, "sampler": loader.sampler}
    return {**arguments, "shuffle": type(loader.sampler) is RandomSampler}


def _build_dataset(dataset: Any) -> Any:
    built = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
    if isinstance(built, str | Mapping) or not (hasattr(built, "__getitem__") or isinstance(built, IterableDataset)):
        raise ConfigTypeError(f"A dataset is a Dataset, a sequence, or a mapping with its type, not {built!r}.")
    if not isinstance(dataset, Mapping):
        return built
    # Datasets written for MMEngine-style configurations may load their annotations late.
    full_init = getattr(built, "full_init", None)
    if callable(full_init):
        full_init()
    return built


def _take_source(
    cfg: dict[str, Any], dataset: Any, *, seed: int, training: bool, dealt: dict[str, int]
) -> PositionedBatches | ForeignBatches:
    """Return where the batches come from, and take DataLoader's sampling arguments out of ``cfg``."""
    sampler, batch_sampler, shuffle = (cfg.pop(name, None) for name in ("sampler", "batch_sampler", "shuffle"))
    if sampler is not None and shuffle is not None:
        raise ConfigValueError("A dataloader takes a sampler or shuffle, not both: say shuffle in the sampler.")
    built = not (batch_sampler is None or isinstance(batch_sampler, Mapping))
    if built and (sampler is not None or shuffle is not None):
        raise ConfigValueError("A batch sampler that is built has its own sampler; give neither sampler nor shuffle.")
    if built:
        return _known(batch_sampler)
    if batch_sampler is not None and _makes_batches_alone(batch_sampler):
        if sampler is not None:
            raise ConfigValueError(
                f"The batch sampler {batch_sampler['type']} takes no sampler; give it shuffle instead."
            )
        own = {
            "dataset": dataset,
            "seed": seed,
            "round_up": training,
            "shuffle": training if shuffle is None else shuffle,
        }
        own |= {"batch_size": cfg.pop("batch_size", 1), **dealt}
        return _known(DATA_SAMPLERS.build(batch_sampler, default_args=own))
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise ConfigTypeError(f"{type(dataset).__name__} has no length, so it cannot be dealt; give it a sampler.")
        sampler = DefaultSampler(
            dataset, training if shuffle is None else shuffle, seed=seed, round_up=training, **dealt
        )
    elif isinstance(sampler, Mapping):
        sampler = _build_sampler(sampler, dataset, seed=seed, training=training, dealt=dealt)
    if batch_sampler is None:
        return _in_batches(sampler, cfg.pop("batch_size", 1), drop_last=cfg.pop("drop_last", False))
    batch_size = cfg.pop("batch_size", None)
    default_args = {"sampler": sampler} | ({} if batch_size is None else {"batch_size": batch_size})
    return _known(DATA_SAMPLERS.build(batch_sampler, default_args=default_args))


def _known(batch_sampler: Any) -> PositionedBatches | ForeignBatches:
    """Return the source that a batch sampler stands for."""
    if isinstance(batch_sampler, PositionedBatches):
        return batch_sampler
    if type(batch_sampler) is BatchSampler and isinstance(batch_sampler.sampler, PositionedSampler):
        return DealtBatches(batch_sampler.sampler, batch_sampler.batch_size, drop_last=batch_sampler.drop_last)
    return ForeignBatches(batch_sampler, single=False)


def _in_batches(sampler: Any, batch_size: int | None, *, drop_last: bool) -> PositionedBatches | ForeignBatches:
    if batch_size is None:
        if drop_last:
            raise ConfigValueError("drop_last=True leaves out a short batch, and batch_size=None makes none.")
        known = isinstance(sampler, PositionedSampler)
        return DealtBatches(sampler, 1, drop_last=False) if known else ForeignBatches(sampler, single=True)
    try:
        return _known(BatchSampler(sampler, batch_size, drop_last))
    except ValueError as error:
        raise ConfigValueError(f"The dataloader's arguments do not fit: {error}") from error


def _makes_batches_alone(batch_sampler: Mapping[str, Any]) -> bool:
    target = _target(batch_sampler)
    return isinstance(target, type) and issubclass(target, PositionedBatches)


def _build_sampler(
    sampler: Mapping[str, Any], dataset: Any, *, seed: int, training: bool, dealt: dict[str, int]
) -> Any:
    target = _target(sampler)
    default_args: dict[str, Any] = {"dataset": dataset, "seed": seed}
    if isinstance(target, type) and issubclass(target, PositionedSampler):
        default_args |= dealt
        if "round_up" in inspect.signature(target).parameters:
            default_args["round_up"] = training
    return DATA_SAMPLERS.build(sampler, default_args=default_args)


def _target(sampler: Mapping[str, Any]) -> Any:
    kind = sampler.get("type")
    return DATA_SAMPLERS.get(kind) if isinstance(kind, str) else kind


def _as_it_is(batch: Any) -> Any:
    """Return the batch, which the dataset has collated."""
    return batch


def _build_function(function: Any, name: str) -> Any:
    if isinstance(function, Mapping):
        arguments = dict(function)
        kind = arguments.pop("type", None)
        target = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
        if not callable(target):
            raise ConfigTypeError(f"{name}: type={kind!r} is no function that is known or can be called.")
        refuse_data_arguments(target, function, f"{name}: ")
        return functools.partial(target, **arguments) if arguments else target
    if not callable(function):
        raise ConfigTypeError(f"{name} is a function or a mapping with its type, not {function!r}.")
    return function
