"""Loaders that can begin anywhere in an epoch."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from stratagem.data.collate import pseudo_collate
from stratagem.data.samplers import DefaultSampler, PositionedSampler, stream_seed
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS

__all__ = ["EpochLoader", "build_dataloader"]


@final
class EpochLoader:
    """A ``DataLoader`` whose iteration is asked for by epoch and position.

    Args:
        loader: any ``DataLoader``; one whose sampler is a :class:`PositionedSampler` begins in the middle of an epoch
            at no cost, others draw and drop what was seen.
        world_size: over how many ranks the sampler deals.
    """

    def __init__(self, loader: DataLoader[Any], *, world_size: int = 1) -> None:
        self.loader = loader
        self._world_size = world_size
        self._sampler = _positioned_sampler(loader)
        self._set_epoch = _epoch_setters(loader)

    @property
    def dataset(self) -> Any:
        """The dataset that is loaded."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """How many samples a batch of this rank has; None where the loader does not say."""
        batch_sampler = self.loader.batch_sampler
        size = self.loader.batch_size if batch_sampler is None else getattr(batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else None

    @property
    def length(self) -> int | None:
        """How many batches an epoch of this rank has; None for streams without a length."""
        if isinstance(self.dataset, IterableDataset) and not isinstance(self.dataset, Sized):
            return None
        return len(self.loader)

    @property
    def positioned(self) -> bool:
        """Whether a position inside of an epoch can be taken up without drawing what came before it."""
        return self._sampler is not None

    def batches(self, epoch: int, done: int = 0) -> Iterator[Any]:
        """Begin an epoch after its first ``done`` batches; returns the loader's own iterator."""
        for set_epoch in self._set_epoch:
            set_epoch(epoch)
        if isinstance(self.loader.worker_init_fn, _WorkerSeed):
            self.loader.worker_init_fn.epoch = epoch
        if self._sampler is not None:
            if self._sampler.endless:
                done += epoch * len(self.loader)
            elif done == len(self.loader):
                return iter(())  # the last batch may be short, so that counting samples would go beyond the end
            self._sampler.set_start(done * (self.batch_size or 1) * self._world_size)
            return iter(self.loader)
        batches = iter(self.loader)
        for _ in islice(batches, done):
            pass
        return batches

    def indices_of(self, epoch: int, batch: int) -> list[int] | None:
        """Return the dataset's indices of this rank's samples in a batch of an epoch; None where they are not known."""
        if self._sampler is None or self.batch_size is None:
            return None
        sampler = copy.copy(self._sampler)  # the one in use keeps its place
        sampler.set_epoch(epoch)
        done = batch + epoch * len(self.loader) if sampler.endless else batch
        sampler.set_start(done * self.batch_size * self._world_size)
        return list(islice(sampler, self.batch_size))


def _positioned_sampler(loader: DataLoader[Any]) -> PositionedSampler | None:
    """Return the sampler of which every batch takes the next ``batch_size`` samples; None where that is not so."""
    # Other batch samplers may sort or group what they take.
    sampler = loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else None
    return sampler if isinstance(sampler, PositionedSampler) else None


def _epoch_setters(loader: DataLoader[Any]) -> list[Callable[[int], None]]:
    """Return the ``set_epoch`` of the dataset's stream, the batch sampler and the sampler, of those that have it."""
    batch_sampler = loader.batch_sampler
    sampler = loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
    stream = loader.dataset if isinstance(loader.dataset, IterableDataset) else None
    setters = [getattr(part, "set_epoch", None) for part in (stream, batch_sampler, sampler)]
    return [setter for setter in setters if callable(setter)]


@final
class _WorkerSeed:
    """Seed a worker process from (seed, epoch, rank, worker), so that no two draw the same."""

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank
        self.epoch = 0

    def __call__(self, worker: int) -> None:
        seed = stream_seed(self.seed, self.epoch, self.rank, worker)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


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
    ours that does the same, so that its samples are dealt to the ranks and its order can be taken up anywhere. One with
    another sampler, batch sampler or a generator of its own is taken as it is.

    A mapping holds the arguments of ``torch.utils.data.DataLoader`` with ``dataset``, ``sampler``, ``batch_sampler``,
    ``collate_fn`` and ``worker_init_fn`` as objects or as configurations of their own. Without a sampler it is a
    :class:`DefaultSampler`, which shuffles in training (or as ``shuffle`` says). For evaluation, samplers of ours do
    not fill up, so no sample is counted twice. ``collate_fn`` is ``pseudo_collate`` where not given.

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
    dealt = {"rank": rank, "world_size": world_size}
    if not isinstance(dataset, IterableDataset):
        cfg |= _build_samplers(cfg, dataset, seed=seed, training=training, dealt=dealt)
    # Torch draws the workers' base seed when an iteration begins: from a generator of the loader's own, so that stopping
    # and going on does not shift the model's random numbers.
    if cfg.get("generator") is None:
        cfg["generator"] = torch.Generator().manual_seed(stream_seed(seed, rank))
    # Without batches there is nothing to collate.
    if "collate_fn" in cfg or cfg.get("batch_size", 1) is not None:
        cfg["collate_fn"] = _build_function(cfg.get("collate_fn", pseudo_collate), "collate_fn")
    if cfg.get("worker_init_fn") is None:
        cfg["worker_init_fn"] = _WorkerSeed(seed, rank)
    else:
        cfg["worker_init_fn"] = _build_function(cfg["worker_init_fn"], "worker_init_fn")
    try:
        loader: DataLoader[Any] = DataLoader(dataset, **cfg)
    except (TypeError, ValueError) as error:
        kind = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
        raise kind(f"The dataloader's arguments do not fit torch.utils.data.DataLoader: {error}") from error
    return EpochLoader(loader, world_size=world_size)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader's order is one that our own sampler gives as well: all samples, in order or shuffled."""
    sampler = loader.sampler
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler or loader.generator is not None:
        return False
    if getattr(sampler, "data_source", None) is not loader.dataset:
        return False
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return whole and sampler.generator is None
    return type(sampler) is SequentialSampler


def _arguments_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the arguments that make a plain loader like this one."""
    names = (
        "dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
        "multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order",
    )  # fmt: skip
    arguments = {name: getattr(loader, name) for name in names}
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


def _build_samplers(
    cfg: dict[str, Any], dataset: Any, *, seed: int, training: bool, dealt: dict[str, int]
) -> dict[str, Any]:
    """Return DataLoader's sampling arguments, and take ours out of ``cfg``."""
    sampler = cfg.pop("sampler", None)
    batch_sampler = cfg.pop("batch_sampler", None)
    shuffle = cfg.pop("shuffle", None)
    if sampler is not None and shuffle is not None:
        raise ConfigValueError("A dataloader takes a sampler or shuffle, not both: say shuffle in the sampler.")
    if not (batch_sampler is None or isinstance(batch_sampler, Mapping)):
        if sampler is not None or shuffle is not None:
            raise ConfigValueError(
                "A batch sampler that is built has its own sampler; give neither sampler nor shuffle."
            )
        return {"batch_sampler": batch_sampler}
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise ConfigTypeError(f"{type(dataset).__name__} has no length, so it cannot be dealt; give it a sampler.")
        sampler = DefaultSampler(
            dataset, training if shuffle is None else shuffle, seed=seed, round_up=training, **dealt
        )
    elif isinstance(sampler, Mapping):
        sampler = _build_sampler(sampler, dataset, seed=seed, training=training, dealt=dealt)
    if batch_sampler is None:
        return {"sampler": sampler}
    batch_size = cfg.pop("batch_size", None)
    default_args = {"sampler": sampler} | ({} if batch_size is None else {"batch_size": batch_size})
    return {"batch_sampler": DATA_SAMPLERS.build(batch_sampler, default_args=default_args)}


def _build_sampler(
    sampler: Mapping[str, Any], dataset: Any, *, seed: int, training: bool, dealt: dict[str, int]
) -> Sampler[Any]:
    kind = sampler.get("type")
    target = DATA_SAMPLERS.get(kind) if isinstance(kind, str) else kind
    default_args: dict[str, Any] = {"dataset": dataset, "seed": seed}
    if isinstance(target, type) and issubclass(target, PositionedSampler):
        default_args |= dealt
        if target is DefaultSampler:
            default_args["round_up"] = training
    built: Sampler[Any] = DATA_SAMPLERS.build(sampler, default_args=default_args)
    return built


def _build_function(function: Any, name: str) -> Any:
    if isinstance(function, Mapping):
        arguments = dict(function)
        kind = arguments.pop("type", None)
        target = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
        if not callable(target):
            raise ConfigTypeError(f"{name}: type={kind!r} is no function that is known or can be called.")
        return functools.partial(target, **arguments) if arguments else target
    if not callable(function):
        raise ConfigTypeError(f"{name} is a function or a mapping with its type, not {function!r}.")
    return function
