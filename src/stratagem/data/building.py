"""Loaders from configurations and from built ones, with their data divided among the ranks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from stratagem.data.batches import EpochBatches, OpaqueBatches, PositionedBatches, RankBatches
from stratagem.data.loader import EpochLoader
from stratagem.data.rank_share import RankShare, declared_share
from stratagem.data.samplers import DefaultSampler, PositionedSampler, UnpaddedSampler
from stratagem.data.stateful import ResumableStream, Stateful
from stratagem.data.streams import StreamedDataset, draws_numbers, stream_seed
from stratagem.data.workers import WorkerInit
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from stratagem.utils.data_rules import refuse_data_arguments

__all__ = ["build_dataloader"]

_Positioned = TypeVar("_Positioned", PositionedBatches, PositionedSampler)


def build_dataloader(
    dataloader: DataLoader[Any] | Mapping[str, Any],
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    training: bool,
) -> EpochLoader:
    """Build a loader from its configuration, or take a built one; divide its data among the data-parallel ranks.

    A built ``DataLoader`` that takes all samples in order or in torch's random order is rebuilt with the built-in sampler
    that does the same, so that its order can be resumed anywhere; so is one with a built-in sampler, or over a stream.
    Any other keeps its type, its sampler or batch sampler and its generator: the ranks take turns at the samples of a
    sampler, at the batches of a batch sampler, and at the batches that a stream or a loader with its own ``__iter__``
    gives, which every rank reads in full. What is already divided for these ranks (``num_replicas`` and ``rank``, see
    :func:`~stratagem.data.rank_share.declared_share`) is taken as it is.

    A mapping holds the arguments of ``torch.utils.data.DataLoader`` with ``dataset``, ``sampler``, ``batch_sampler``,
    ``collate_fn`` and ``worker_init_fn`` as objects or as configurations. Without a sampler it is a
    :class:`DefaultSampler`, which shuffles in training (or as ``shuffle`` says). ``collate_fn`` is torch's
    ``default_collate`` if it is not given. In training the ranks have the same number of batches, for which less than one
    sample, or one batch, per rank is repeated at the end of an epoch; in evaluation nothing is repeated.

    What a dataset with ``__getitem__``, and ``collate_fn``, draw from the generators of Python, NumPy and torch depends on
    the seed, the epoch and the sample alone. A ``worker_init_fn`` is called, but its seeding is of no consequence.

    Args:
        dataloader: see above.
        seed: of the order and of random numbers, the same on every rank.
        rank: this process's data-parallel rank.
        world_size: the number of data-parallel ranks.
        training: whether it is for training, or for evaluation.

    Raises:
        ConfigTypeError: if a part has the wrong type.
        ConfigValueError: if there is no dataset, two parts would choose the samples, or a part is already divided, but
            for other ranks.
    """
    share = RankShare(rank, world_size, round_up=training)
    if isinstance(dataloader, DataLoader):
        if not _is_plain(dataloader):
            return _take_loader(dataloader, seed, share)
        dataloader = _arguments_of(dataloader)
    if not isinstance(dataloader, Mapping):
        raise ConfigTypeError(f"A dataloader is a DataLoader or a mapping of its arguments, not {dataloader!r}.")
    cfg = dict(dataloader)
    if "dataset" not in cfg:
        raise ConfigValueError(f"A dataloader needs a dataset; it has {', '.join(map(repr, cfg)) or 'nothing'}.")
    dataset = _build_dataset(cfg.pop("dataset"))
    stream_share = (
        share if isinstance(dataset, IterableDataset) and share.size > 1 and not _is_divided(dataset, share) else None
    )
    # What every rank reads in full must be the same on every rank.
    stream_rank = rank if stream_share is None else 0
    # Torch draws the workers' base seed when an iteration begins: from a generator of the loader's own, so that stopping
    # and resuming does not shift the model's random numbers.
    if cfg.get("generator") is None:
        cfg["generator"] = torch.Generator().manual_seed(stream_seed(seed, stream_rank))
    single = cfg.get("batch_size", 1) is None and cfg.get("batch_sampler") is None
    # Without batches there is nothing to collate.
    if "collate_fn" in cfg or not single:
        cfg["collate_fn"] = _build_function(cfg.get("collate_fn", default_collate), "collate_fn")
    then = cfg.get("worker_init_fn")
    then = None if then is None else _build_function(then, "worker_init_fn")
    cfg["worker_init_fn"] = WorkerInit(seed, stream_rank, then)
    if not isinstance(dataset, IterableDataset):
        source = _take_source(cfg, dataset, seed=seed, training=training, share=share)
        streamed = draws_numbers(dataset, cfg.get("collate_fn"))
        batches = EpochBatches(source, streamed=streamed, single=single)
        cfg |= {"sampler": batches, "batch_size": None} if single else {"batch_sampler": batches}
        if streamed:
            dataset = StreamedDataset(dataset, cfg.get("collate_fn"), seed)
            cfg |= {"collate_fn": _as_it_is} if "collate_fn" in cfg else {}
    elif isinstance(dataset, Stateful) and not cfg.get("num_workers"):
        dataset = ResumableStream(dataset)
    try:
        loader: DataLoader[Any] = DataLoader(dataset, **cfg)
    except (TypeError, ValueError) as error:
        kind = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
        raise kind(f"The dataloader's arguments do not fit torch.utils.data.DataLoader: {error}") from error
    return EpochLoader(loader, world_size=world_size, seed=seed, share=stream_share)


def _take_loader(loader: DataLoader[Any], seed: int, share: RankShare) -> EpochLoader:
    """Take a built loader that keeps its own order."""
    parts = (loader, loader.dataset) if isinstance(loader.dataset, IterableDataset) else (loader,)
    divided = [_is_divided(part, share) for part in parts]
    is_stateful = isinstance(loader, Stateful)
    if isinstance(loader.dataset, IterableDataset) or not _iterates_its_sampler(loader) or any(divided):
        whole = share.size == 1 or any(divided)
        return EpochLoader(loader, world_size=share.size, seed=seed, share=None if whole else share)
    if is_stateful and share.size == 1:
        return EpochLoader(loader)
    single = loader.batch_sampler is None
    source = _foreign(loader.sampler if single else loader.batch_sampler, single=single, seed=seed, share=share)
    batches = source if is_stateful else EpochBatches(source, streamed=False, single=single)
    copied = copy.copy(loader)
    # Torch refuses plain assignments. The copy has no workers yet, even if persistent ones serve the original.
    object.__setattr__(copied, "sampler" if single else "batch_sampler", batches)
    object.__setattr__(copied, "_iterator", None)
    return EpochLoader(copied, world_size=share.size, seed=seed)


def _iterates_its_sampler(loader: DataLoader[Any]) -> bool:
    """Return whether the loader takes its batches from its (batch) sampler; another ``__iter__`` may not."""
    iterates = type(loader).__iter__
    return iterates is DataLoader.__iter__ or iterates.__module__.partition(".")[0] == "torchdata"


def _is_divided(part: Any, share: RankShare) -> bool:
    """Return whether a part yields this rank's data alone.

    Raises:
        ConfigValueError: if it is divided for other ranks.
    """
    declared = declared_share(part)
    if declared is None or declared == (share.rank, share.size):
        return declared is not None
    raise ConfigValueError(
        f"{type(part).__name__} is divided for rank {declared[0]} of {declared[1]}, and this process is data-parallel rank "
        f"{share.rank} of {share.size}. Build it for these ranks, or give one that is not divided; the engine then "
        "divides it."
    )


def _foreign(sampler: Any, *, single: bool, seed: int, share: RankShare) -> OpaqueBatches:
    """Return the source for a sampler or batch sampler that is not built in."""
    inner = sampler if single else getattr(sampler, "sampler", None)
    divided = [_is_divided(part, share) for part in (sampler, inner)]
    if not any(divided):
        return OpaqueBatches(sampler, single=single, seed=seed, share=share)
    if not share.round_up and isinstance(inner, DistributedSampler) and not inner.drop_last:
        unpadded = UnpaddedSampler(inner)
        if single:
            sampler = unpadded
        elif type(sampler) is BatchSampler:
            sampler = BatchSampler(unpadded, sampler.batch_size, sampler.drop_last)
    return OpaqueBatches(sampler, single=single, seed=seed, share=None)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether a built-in sampler gives the loader's order."""
    sampler = loader.sampler
    if type(loader) is not DataLoader or loader.generator is not None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    if isinstance(loader.batch_sampler, PositionedBatches):
        return True
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not sampler:
        # Given a batch sampler, torch makes a sampler that nothing uses.
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
    cfg: dict[str, Any], dataset: Any, *, seed: int, training: bool, share: RankShare
) -> PositionedBatches | OpaqueBatches:
    """Return where the batches come from, and take DataLoader's sampling arguments out of ``cfg``."""
    sampler, batch_sampler, shuffle = (cfg.pop(name, None) for name in ("sampler", "batch_sampler", "shuffle"))
    ranks = {"rank": share.rank, "world_size": share.size}
    if sampler is not None and shuffle is not None:
        raise ConfigValueError("A dataloader takes a sampler or shuffle, not both: say shuffle in the sampler.")
    built = not (batch_sampler is None or isinstance(batch_sampler, Mapping))
    if built and (sampler is not None or shuffle is not None):
        raise ConfigValueError("A batch sampler that is built has its own sampler; give neither sampler nor shuffle.")
    if built:
        return _known(batch_sampler, seed, share)
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
        own |= {"batch_size": cfg.pop("batch_size", 1), **ranks}
        return _known(DATA_SAMPLERS.build(batch_sampler, default_args=own), seed, share)
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise ConfigTypeError(f"{type(dataset).__name__} has no length, so it cannot be dealt; give it a sampler.")
        sampler = DefaultSampler(
            dataset, training if shuffle is None else shuffle, seed=seed, round_up=training, **ranks
        )
    elif isinstance(sampler, Mapping):
        sampler = _build_sampler(sampler, dataset, seed=seed, training=training, ranks=ranks)
    if batch_sampler is None:
        size, drop_last = cfg.pop("batch_size", 1), cfg.pop("drop_last", False)
        return _in_batches(sampler, size, drop_last=drop_last, seed=seed, share=share)
    batch_size = cfg.pop("batch_size", None)
    default_args = {"sampler": sampler} | ({} if batch_size is None else {"batch_size": batch_size})
    return _known(DATA_SAMPLERS.build(batch_sampler, default_args=default_args), seed, share)


def _known(batch_sampler: Any, seed: int, share: RankShare) -> PositionedBatches | OpaqueBatches:
    """Return the source that a batch sampler stands for."""
    if isinstance(batch_sampler, PositionedBatches):
        return _for_rank_share(batch_sampler, share)
    if type(batch_sampler) is BatchSampler and isinstance(batch_sampler.sampler, PositionedSampler):
        sampler = _for_rank_share(batch_sampler.sampler, share)
        return RankBatches(sampler, batch_sampler.batch_size, drop_last=batch_sampler.drop_last)
    return _foreign(batch_sampler, single=False, seed=seed, share=share)


def _for_rank_share(sampler: _Positioned, share: RankShare) -> _Positioned:
    """Return a built-in sampler for these ranks: a built one may have been made before they were known.

    In evaluation it does not round up.
    """
    if share.size == 1 and (share.round_up or not sampler.round_up):
        return sampler
    placed = copy.copy(sampler)
    placed.round_up = sampler.round_up and share.round_up
    if share.size > 1:
        placed.rank, placed.world_size = share.rank, share.size
    return placed


def _in_batches(
    sampler: Any, batch_size: int | None, *, drop_last: bool, seed: int, share: RankShare
) -> PositionedBatches | OpaqueBatches:
    if batch_size is None:
        if drop_last:
            raise ConfigValueError("drop_last=True leaves out a short batch, and batch_size=None makes none.")
        if isinstance(sampler, PositionedSampler):
            return RankBatches(_for_rank_share(sampler, share), 1, drop_last=False)
        return _foreign(sampler, single=True, seed=seed, share=share)
    try:
        batches = BatchSampler(sampler, batch_size, drop_last)
    except ValueError as error:
        raise ConfigValueError(f"The dataloader's arguments do not fit: {error}") from error
    return _known(batches, seed, share)


def _makes_batches_alone(batch_sampler: Mapping[str, Any]) -> bool:
    target = _target(batch_sampler)
    return isinstance(target, type) and issubclass(target, PositionedBatches)


def _build_sampler(
    sampler: Mapping[str, Any], dataset: Any, *, seed: int, training: bool, ranks: dict[str, int]
) -> Any:
    target = _target(sampler)
    default_args: dict[str, Any] = {"dataset": dataset, "seed": seed}
    if isinstance(target, type) and issubclass(target, PositionedSampler):
        default_args |= ranks
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
