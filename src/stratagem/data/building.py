"""Build data loaders from configurations or ``DataLoader`` objects, and split their data across the ranks."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from stratagem.data.batches import EpochBatches, OpaqueBatches, PositionedBatches, RankBatches
from stratagem.data.copy_ahead import supports_pinned_memory
from stratagem.data.epoch_stream import EpochStream
from stratagem.data.epochs import follows_epoch, shares_epoch
from stratagem.data.limits import BatchLimit
from stratagem.data.loader import EpochLoader, iterates_its_sampler
from stratagem.data.rank_share import RankShare, declared_share, forms_plain_batches
from stratagem.data.samplers import DefaultSampler, PositionedSampler, UnpaddedSampler
from stratagem.data.stateful import ResumableStream, Stateful, shuffle_buffer_of
from stratagem.data.streams import StreamedDataset, stream_seed, uses_random_numbers
from stratagem.data.workers import WorkerInit
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, Registry
from stratagem.utils import did_you_mean
from stratagem.utils.data_rules import refuse_data_arguments

__all__ = ["build_dataloader", "check_dataloader", "in_dataset_order"]

# When the generators are seeded for each sample.
_STREAMS = ("auto", "always")
_Positioned = TypeVar("_Positioned", PositionedBatches, PositionedSampler)


def build_dataloader(
    dataloader: DataLoader[Any] | Mapping[str, Any],
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    training: bool,
    device: torch.device | None = None,
    limit: BatchLimit | None = None,
    is_divided: bool = False,
) -> EpochLoader:
    """Build a data loader from a configuration or a ``DataLoader``, and split its data across the data-parallel ranks.

    A ``DataLoader`` with torch's sequential or random sampler is rebuilt with the equivalent built-in sampler, which can
    resume at any position. A ``DataLoader`` with a built-in sampler or an iterable dataset is rebuilt as well. Any other loader
    keeps its type, sampler, batch sampler and generator. The samples of a sampler, or the batches of a batch sampler, are
    distributed round-robin over the ranks. Iterable datasets, and loaders with a custom ``__iter__``, are read in full on
    every rank, and their batches are distributed round-robin. An object that already yields only this rank's data
    (``num_replicas`` and ``rank``, see :func:`~stratagem.data.rank_share.declared_share`) is not split again.

    A mapping contains the arguments of ``torch.utils.data.DataLoader``, where ``dataset``, ``sampler``, ``batch_sampler``,
    ``collate_fn`` and ``worker_init_fn`` are objects or configurations. The default sampler is :class:`DefaultSampler`,
    with ``shuffle=True`` during training; the default ``collate_fn`` is ``default_collate``. During training, all ranks have the
    same number of batches: up to one sample, or one batch, per rank is repeated at the end of an epoch. During
    evaluation, nothing is repeated.

    The random numbers that a map-style dataset and ``collate_fn`` draw from the Python, NumPy and torch generators depend
    only on the seed, the epoch and the sample. ``worker_init_fn`` is called, but seeding in it has no effect. With
    ``streams="auto"``, the default, the generators of Python and NumPy are seeded when a sample uses them, and none is seeded for
    datasets of torch that never draw. With ``streams="always"``, all are seeded for every sample; the samples are the same.

    For accelerators, the default is ``pin_memory=True``, and the loops copy the next batch to the device while the model computes
    on the current one. This requires pinned memory, data workers and a position that is counted in batches. A loader with
    ``state_dict`` is not read ahead, because its state would include the batch that has not been trained. A dataset in the main
    process is not read ahead either, because the training could change it between two batches; ``device_prefetch=True`` reads it
    ahead as well. ``device_prefetch=False`` disables reading ahead.

    Args:
        dataloader: a configuration or a ``DataLoader``.
        seed: the seed of the order and the random numbers; the same on every rank.
        rank: the data-parallel rank of this process.
        world_size: the number of data-parallel ranks.
        training: whether the loader is for training rather than evaluation.
        device: the device of the model; None or the CPU if batches are not copied.
        limit: the limit of the number of batches. If every epoch has the batches of the first one, these are the first ones of
            the dataset, unless ``dataloader`` has a sampler or a batch sampler.
        is_divided: whether custom samplers yield only this rank's data, even if they have no ``num_replicas`` and ``rank``.

    Raises:
        ConfigTypeError: if a part has the wrong type.
        ConfigValueError: if there is no dataset, arguments conflict, the data cannot be limited, or a part was built for a
            different rank or number of ranks.
    """
    if limit is not None and limit.first_epoch:
        dataloader = in_dataset_order(dataloader, every_sample=False)
    loader = _build_loader(
        dataloader,
        seed,
        RankShare(rank, world_size, round_up=training, is_divided=is_divided),
        device,
        limited=limit is not None,
    )
    if limit is not None:
        if training and isinstance(loader.loader, Stateful):
            raise ConfigValueError(
                f"{limit}: {type(loader.loader).__name__} saves its position with state_dict, which does not show whether the "
                "next epoch starts over or continues after the limit, so a resumed run could read different samples. Use a "
                "plain DataLoader with the same dataset."
            )
        loader.limit = limit
        limit.count(loader.length)
    return loader


def in_dataset_order(
    dataloader: DataLoader[Any] | Mapping[str, Any], *, every_sample: bool
) -> DataLoader[Any] | Mapping[str, Any]:
    """Return the arguments of a dataloader that does not shuffle.

    Args:
        dataloader: a configuration or a ``DataLoader``. If it has its own sampler or batch sampler, it is returned unchanged.
        every_sample: whether an incomplete last batch is not dropped.
    """
    if isinstance(dataloader, DataLoader):
        if not _is_plain(dataloader):
            return dataloader
        dataloader = _arguments_of(dataloader)
    if not isinstance(dataloader, Mapping) or any(
        dataloader.get(key) is not None for key in ("sampler", "batch_sampler")
    ):
        return dataloader
    return {**dataloader, "shuffle": False, **({"drop_last": False} if every_sample else {})}


def _build_loader(
    dataloader: DataLoader[Any] | Mapping[str, Any],
    seed: int,
    share: RankShare,
    device: torch.device | None,
    *,
    limited: bool,
) -> EpochLoader:
    """Build a data loader without a limit; ``limited`` specifies whether one will be set."""
    device = torch.device("cpu") if device is None else device
    if isinstance(dataloader, DataLoader):
        if not _is_plain(dataloader):
            loader = _take_loader(dataloader, seed, share)
            loader.reads_ahead = _reads_ahead(loader, None, device)
            return loader
        dataloader = _arguments_of(dataloader)
    cfg = _arguments(dataloader)
    device_prefetch = _take_device_prefetch(cfg)
    if supports_pinned_memory(device):
        cfg.setdefault("pin_memory", True)
    built = _build_from_arguments(cfg, seed=seed, share=share, limited=limited)
    built.reads_ahead = _reads_ahead(built, device_prefetch, device)
    built.must_read_ahead = device_prefetch is True
    return built


def _build_from_arguments(cfg: dict[str, Any], *, seed: int, share: RankShare, limited: bool) -> EpochLoader:
    """Build a data loader from the arguments of ``DataLoader`` and the option ``streams``, which are removed from ``cfg``."""
    rank, world_size, training = share.rank, share.size, share.round_up
    dataset = _build_dataset(cfg.pop("dataset"))
    lazy = _take_streams(cfg, dataset)
    stream_share = (
        share if isinstance(dataset, IterableDataset) and share.size > 1 and not _is_divided(dataset, share) else None
    )
    # A stream that every rank reads in full must be the same on every rank.
    stream_rank = rank if stream_share is None else 0
    # Torch draws the workers' base seed at the start of each iteration. A separate generator keeps that from changing the
    # model's random numbers after a resume.
    if cfg.get("generator") is None:
        cfg["generator"] = torch.Generator().manual_seed(stream_seed(seed, stream_rank))
    single = cfg.get("batch_size", 1) is None and cfg.get("batch_sampler") is None
    # Without batching, samples need not be collated.
    if "collate_fn" in cfg or not single:
        cfg["collate_fn"] = _build_function(cfg.get("collate_fn", default_collate), "collate_fn")
    user_init = cfg.get("worker_init_fn")
    user_init = None if user_init is None else _build_function(user_init, "worker_init_fn")
    cfg["worker_init_fn"] = WorkerInit(seed, stream_rank, user_init)
    if not isinstance(dataset, IterableDataset):
        source = _take_source(cfg, dataset, seed=seed, training=training, share=share)
        streamed = not lazy or uses_random_numbers(dataset, cfg.get("collate_fn"))
        batches = EpochBatches(source, streamed=streamed, single=single)
        cfg |= {"sampler": batches, "batch_size": None} if single else {"batch_sampler": batches}
        if streamed:
            dataset = StreamedDataset(dataset, cfg.get("collate_fn"), seed, lazy=lazy)
            cfg |= {"collate_fn": _identity} if "collate_fn" in cfg else {}
    elif (
        isinstance(dataset, Stateful)
        and not cfg.get("num_workers")
        and shuffle_buffer_of(dataset) is None
        # The state after a limited epoch does not show that the next one starts over.
        and not (limited and training)
    ):
        dataset = ResumableStream(dataset)
    elif cfg.get("persistent_workers") and not isinstance(dataset, IterDataPipe):
        # Torch handles the shuffling and sharding of data pipes only if they are not wrapped.
        dataset = EpochStream(dataset, seed, stream_rank)
    try:
        loader: DataLoader[Any] = DataLoader(dataset, **cfg)
    except (TypeError, ValueError) as error:
        kind = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
        raise kind(f"Invalid arguments for torch.utils.data.DataLoader: {error}") from error
    return EpochLoader(loader, world_size=world_size, seed=seed, share=stream_share)


def _take_device_prefetch(cfg: dict[str, Any]) -> bool | None:
    """Take the option ``device_prefetch`` out of a configuration.

    Raises:
        ConfigTypeError: if its value is invalid.
        ConfigValueError: if it is True and ``pin_memory`` is False.
    """
    prefetch = cfg.pop("device_prefetch", None)
    if not (prefetch is None or isinstance(prefetch, bool)):
        raise ConfigTypeError(f"dataloader: device_prefetch must be True, False or None, got {prefetch!r}.")
    if prefetch and cfg.get("pin_memory", True) is False:
        raise ConfigValueError(
            "dataloader: device_prefetch=True requires pinned memory, because copies from other memory block, but pin_memory is "
            "False. Remove one of the two options."
        )
    return prefetch


def _reads_ahead(loader: EpochLoader, prefetch: bool | None, device: torch.device) -> bool:
    """Return whether to copy the next batch of a loader to ``device`` before the current one is processed.

    Args:
        loader: the loader.
        prefetch: the option ``device_prefetch``. None excludes datasets that are loaded in the main process, which the training
            could change between two batches.
        device: the device of the model.

    Raises:
        ConfigValueError: if reading ahead is requested, but impossible.
    """
    if prefetch and loader.is_stateful:
        kind = type(loader.loader if isinstance(loader.loader, Stateful) else loader.dataset).__name__
        raise ConfigValueError(
            f"dataloader: device_prefetch=True reads one batch ahead, but the position in the data is {kind}.state_dict(), which "
            "would include the batch that has not been trained. A resumed run would skip it. Remove device_prefetch."
        )
    if prefetch and device.type == "mps":
        raise ConfigValueError(
            "dataloader: device_prefetch=True requires pinned memory, which mps does not have. Remove device_prefetch."
        )
    if prefetch is False or loader.is_stateful or not supports_pinned_memory(device):
        return False
    return bool(prefetch or (loader.loader.pin_memory and loader.loader.num_workers))


def _take_streams(cfg: dict[str, Any], dataset: Any) -> bool:
    """Take the option ``streams`` out of a configuration; return whether the generators may be seeded when they are used.

    Raises:
        ConfigValueError: if its value is unknown, or the dataset is iterable, whose samples have no streams.
    """
    streams = cfg.pop("streams", "auto")
    if streams not in _STREAMS:
        raise ConfigValueError(f"dataloader: unknown streams={streams!r}. {did_you_mean(str(streams), _STREAMS)}")
    if streams != "auto" and isinstance(dataset, IterableDataset):
        raise ConfigValueError(
            f"dataloader: streams={streams!r} requires a map-style dataset, but {type(dataset).__name__} is iterable, and its "
            "samples have no separate streams. Remove the option."
        )
    return bool(streams == "auto")


def check_dataloader(dataloader: Any, *, training: bool) -> None:
    """Check the arguments of a data loader, as :func:`build_dataloader` does, with two numbers instead of the dataset.

    Neither the dataset nor a sampler is built, because a sampler may read the dataset.

    Args:
        dataloader: a configuration; a loader that is already built is not checked.
        training: whether the loader is for training.

    Raises:
        ConfigTypeError: if a part has the wrong type.
        ConfigValueError: if arguments are invalid or conflict.
    """
    if dataloader is None or isinstance(dataloader, DataLoader):
        return
    cfg = _arguments(dataloader)
    cfg["dataset"] = dataset = _without_samples(cfg["dataset"])
    if not isinstance(dataset, IterableDataset):
        _check_sampling(cfg.get("sampler"), cfg.get("batch_sampler"), cfg.get("shuffle"))
        sampler = SequentialSampler(dataset)
        if isinstance(cfg.get("batch_sampler"), Mapping):
            cfg = {key: value for key, value in cfg.items() if key not in ("sampler", "shuffle", "batch_size")}
            cfg["batch_sampler"] = BatchSampler(sampler, 1, drop_last=False)
        elif isinstance(cfg.get("sampler"), Mapping):
            cfg["sampler"] = sampler
    with warnings.catch_warnings():
        # Building warns again, for example of too many workers.
        warnings.simplefilter("ignore")
        build_dataloader(cfg, seed=0, training=training)


class _NoStream(IterableDataset[int]):
    """Stands for a stream."""

    def __iter__(self) -> Iterator[int]:
        return iter((0, 1))


def _without_samples(dataset: Any) -> Any:
    """Return a dataset of two numbers of the same kind: a stream or a list."""
    kind = _target(DATASETS, dataset) if isinstance(dataset, Mapping) else type(_require_dataset(dataset))
    if not (isinstance(kind, type) and issubclass(kind, IterableDataset)):
        return [0, 1]
    return type(kind.__name__, (_NoStream,), {})()  # Error messages contain the name.


def _take_loader(loader: DataLoader[Any], seed: int, share: RankShare) -> EpochLoader:
    """Return a loader that wraps a ``DataLoader`` and keeps its order."""
    _require_reachable_epoch(loader)
    parts = (loader, loader.dataset) if isinstance(loader.dataset, IterableDataset) else (loader,)
    divided = [_is_divided(part, share) for part in parts]
    is_stateful = isinstance(loader, Stateful)
    if not iterates_its_sampler(loader) or any(divided):
        whole = share.size == 1 or any(divided)
        return EpochLoader(loader, world_size=share.size, seed=seed, share=None if whole else share)
    if is_stateful and share.size == 1:
        return EpochLoader(loader)
    single = loader.batch_sampler is None
    source = _opaque_batches(loader.sampler if single else loader.batch_sampler, single=single, seed=seed, share=share)
    batches = source if is_stateful else EpochBatches(source, streamed=False, single=single)
    copied = copy.copy(loader)
    # DataLoader.__setattr__ raises an error. The copy has no workers yet, even if the original has persistent workers.
    object.__setattr__(copied, "sampler" if single else "batch_sampler", batches)
    object.__setattr__(copied, "_iterator", None)
    return EpochLoader(copied, world_size=share.size, seed=seed)


def _require_reachable_epoch(loader: DataLoader[Any]) -> None:
    """Check that ``set_epoch`` of the dataset reaches the workers.

    Raises:
        ConfigValueError: if the workers keep a copy of the dataset from the first epoch.
    """
    dataset = loader.dataset
    if loader.num_workers and loader.persistent_workers and follows_epoch(dataset) and not shares_epoch(dataset):
        kind, own = type(loader).__name__, type(dataset).__name__
        raise ConfigValueError(
            f"{own} has set_epoch, but with persistent_workers=True the {loader.num_workers} workers of this {kind} keep a copy "
            f"of the dataset from the first epoch, so they would never receive a later epoch number. Set "
            "persistent_workers=False, or pass the arguments of the loader as a mapping (dataset, batch_size, num_workers ...), "
            "so that the epoch is passed to the persistent workers. The loader was not "
            "rebuilt because of its type, its sampler or its generator."
        )


def _is_divided(part: Any, share: RankShare) -> bool:
    """Return whether a part yields only the data of this rank.

    Raises:
        ConfigValueError: if it yields the data of a different rank or was built for a different number of ranks.
    """
    declared = declared_share(part)
    if declared is None or declared == (share.rank, share.size):
        return declared is not None
    raise ConfigValueError(
        f"{type(part).__name__} yields the data of rank {declared[0]} of {declared[1]}, but this process is data-parallel rank "
        f"{share.rank} of {share.size}. Build it for this rank and number of ranks, or pass an object that yields "
        "all the data, which is then split across the ranks automatically."
    )


def _opaque_batches(sampler: Any, *, single: bool, seed: int, share: RankShare) -> OpaqueBatches:
    """Return the batches of a custom sampler or batch sampler."""
    inner = sampler if single else getattr(sampler, "sampler", None)
    divided = [_is_divided(part, share) for part in (sampler, inner)]
    if not (share.is_divided or any(divided)):
        return OpaqueBatches(sampler, single=single, seed=seed, share=share)
    if not share.round_up and isinstance(inner, DistributedSampler) and not inner.drop_last:
        unpadded = UnpaddedSampler(inner)
        if single:
            sampler = unpadded
        elif forms_plain_batches(sampler):
            sampler = BatchSampler(unpadded, sampler.batch_size, sampler.drop_last)
    return OpaqueBatches(sampler, single=single, seed=seed, share=None)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether an equivalent built-in sampler exists, so that the loader can be rebuilt."""
    sampler = loader.sampler
    if type(loader) is not DataLoader or loader.generator is not None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    if isinstance(loader.batch_sampler, PositionedBatches):
        return True
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not sampler:
        # With a custom batch sampler, torch also creates a sampler, which is unused.
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
    """Return the arguments for rebuilding a loader."""
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


def _arguments(dataloader: Any) -> dict[str, Any]:
    if not isinstance(dataloader, Mapping):
        raise ConfigTypeError(f"A dataloader must be a DataLoader or a mapping of its arguments, got {dataloader!r}.")
    if "dataset" not in dataloader:
        keys = ", ".join(map(repr, dataloader)) or "empty"
        raise ConfigValueError(f"A dataloader needs a dataset; its keys are {keys}.")
    return dict(dataloader)


def _require_dataset(built: Any) -> Any:
    if isinstance(built, str | Mapping) or not (hasattr(built, "__getitem__") or isinstance(built, IterableDataset)):
        raise ConfigTypeError(f"A dataset must be a Dataset, a sequence, or a mapping with a type, got {built!r}.")
    return built


def _build_dataset(dataset: Any) -> Any:
    built = _require_dataset(DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset)
    if not isinstance(dataset, Mapping):
        return built
    # MMEngine-style datasets may load their annotations lazily.
    full_init = getattr(built, "full_init", None)
    if callable(full_init):
        full_init()
    return built


def _take_source(
    cfg: dict[str, Any], dataset: Any, *, seed: int, training: bool, share: RankShare
) -> PositionedBatches | OpaqueBatches:
    """Return the source of batches, and remove the DataLoader's sampling arguments from ``cfg``."""
    sampler, batch_sampler, shuffle = (cfg.pop(name, None) for name in ("sampler", "batch_sampler", "shuffle"))
    ranks = {"rank": share.rank, "world_size": share.size}
    _check_sampling(sampler, batch_sampler, shuffle)
    if not (batch_sampler is None or isinstance(batch_sampler, Mapping)):
        return _source_of(batch_sampler, seed, share)
    if batch_sampler is not None and _needs_no_sampler(batch_sampler):
        own = {
            "dataset": dataset,
            "seed": seed,
            "round_up": training,
            "shuffle": training if shuffle is None else shuffle,
        }
        own |= {"batch_size": cfg.pop("batch_size", 1), **ranks}
        return _source_of(DATA_SAMPLERS.build(batch_sampler, default_args=own), seed, share)
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise ConfigTypeError(f"{type(dataset).__name__} has no length; specify a sampler for it.")
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
    return _source_of(DATA_SAMPLERS.build(batch_sampler, default_args=default_args), seed, share)


def _check_sampling(sampler: Any, batch_sampler: Any, shuffle: Any) -> None:
    """Check that the arguments which determine the order of the samples do not conflict.

    Raises:
        ConfigValueError: if they do.
    """
    if sampler is not None and shuffle is not None:
        raise ConfigValueError("sampler and shuffle are mutually exclusive; set shuffle in the sampler.")
    built = not (batch_sampler is None or isinstance(batch_sampler, Mapping))
    if built and (sampler is not None or shuffle is not None):
        raise ConfigValueError("A batch sampler object has its own sampler; remove sampler and shuffle.")
    if isinstance(batch_sampler, Mapping) and sampler is not None and _needs_no_sampler(batch_sampler):
        raise ConfigValueError(
            f"The batch sampler {batch_sampler['type']} does not take a sampler; set shuffle instead."
        )


def _source_of(batch_sampler: Any, seed: int, share: RankShare) -> PositionedBatches | OpaqueBatches:
    """Return the source of batches for a batch sampler."""
    if isinstance(batch_sampler, PositionedBatches):
        return _for_rank_share(batch_sampler, share)
    if type(batch_sampler) is BatchSampler and isinstance(batch_sampler.sampler, PositionedSampler):
        sampler = _for_rank_share(batch_sampler.sampler, share)
        return RankBatches(sampler, batch_sampler.batch_size, drop_last=batch_sampler.drop_last)
    return _opaque_batches(batch_sampler, single=False, seed=seed, share=share)


def _for_rank_share(sampler: _Positioned, share: RankShare) -> _Positioned:
    """Return a copy of a built-in sampler for these ranks; it may have been built before the ranks were known.

    The copy does not round up during evaluation.
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
            raise ConfigValueError("drop_last=True requires batching, but batch_size is None.")
        if isinstance(sampler, PositionedSampler):
            return RankBatches(_for_rank_share(sampler, share), 1, drop_last=False)
        return _opaque_batches(sampler, single=True, seed=seed, share=share)
    try:
        batches = BatchSampler(sampler, batch_size, drop_last)
    except ValueError as error:
        raise ConfigValueError(f"Invalid dataloader arguments: {error}") from error
    return _source_of(batches, seed, share)


def _needs_no_sampler(batch_sampler: Mapping[str, Any]) -> bool:
    target = _target(DATA_SAMPLERS, batch_sampler)
    return isinstance(target, type) and issubclass(target, PositionedBatches)


def _build_sampler(
    sampler: Mapping[str, Any], dataset: Any, *, seed: int, training: bool, ranks: dict[str, int]
) -> Any:
    target = _target(DATA_SAMPLERS, sampler)
    default_args: dict[str, Any] = {"dataset": dataset, "seed": seed}
    if isinstance(target, type) and issubclass(target, PositionedSampler):
        default_args |= ranks
        if "round_up" in inspect.signature(target).parameters:
            default_args["round_up"] = training
    return DATA_SAMPLERS.build(sampler, default_args=default_args)


def _target(registry: Registry, cfg: Mapping[str, Any]) -> Any:
    kind = cfg.get("type")
    return registry.get(kind) if isinstance(kind, str) else kind


def _identity(batch: Any) -> Any:
    """Return the batch, which the dataset has already collated."""
    return batch


def _build_function(function: Any, name: str) -> Any:
    if isinstance(function, Mapping):
        arguments = dict(function)
        kind = arguments.pop("type", None)
        target = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
        if not callable(target):
            raise ConfigTypeError(f"{name}: type={kind!r} is neither a registered function nor callable.")
        refuse_data_arguments(target, function, f"{name}: ")
        return functools.partial(target, **arguments) if arguments else target
    if not callable(function):
        raise ConfigTypeError(f"{name} must be a function or a mapping with a type, got {function!r}.")
    return function
