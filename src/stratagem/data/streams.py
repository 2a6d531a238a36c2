"""Random numbers for data loading: one stream per sample and epoch, independent of the process that loads the sample.

Datasets draw from the global generators of Python, NumPy and torch. Before each sample is loaded, they are seeded from
(seed, epoch, sample), so augmentations do not depend on the rank, the worker or the previously loaded samples. In the main
process, where dropout uses the same generators, their state is restored afterwards. The generators of NumPy and Python are
only seeded if they are used; see :mod:`stratagem.data.seeding`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from stratagem.data.collate import pseudo_collate, stack_samples
from stratagem.data.epochs import set_epoch_of
from stratagem.data.seeding import Generators, begin_seeding, seed_generators

__all__ = ["BatchRequest", "StreamedDataset", "seed_stream", "stream_seed", "uses_random_numbers"]

# The stream for operations on a whole batch, such as mixing its samples in collate_fn.
_BATCH = "batch"
# The seeds of the generators of Python, NumPy and torch. They use different bytes of a digest, because NumPy and torch generate
# the same numbers from the same seed.
_SEEDS = struct.Struct("<QII")
_UNPACK, _SEED_BYTES, _HASH = _SEEDS.unpack, _SEEDS.size, hashlib.blake2b


def stream_seed(*keys: object) -> int:
    """Return a 32-bit seed for the stream identified by ``keys``; streams of different keys are independent.

    With the common scheme ``seed + epoch``, epoch 1 of seed 0 would have the same order as epoch 0 of seed 1.
    """
    return int.from_bytes(_digest(keys, 4), "little")


def seed_stream(*keys: object) -> None:
    """Seed the global CPU generators of Python, NumPy and torch for the stream identified by ``keys``."""
    seed_generators(stream_seeds(*keys))


def stream_seeds(*keys: object) -> tuple[int, int, int]:
    """Return the seeds of the generators of Python, NumPy and torch for the stream identified by ``keys``."""
    return cast("tuple[int, int, int]", _UNPACK(_digest(keys, _SEED_BYTES)))


def _digest(keys: tuple[object, ...], size: int) -> bytes:
    return hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=size).digest()


@final
@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A batch to load.

    Attributes:
        epoch: the epoch, a key of the random streams.
        indices: the dataset indices of the samples.
        stream_keys: the key of each sample's random stream within the epoch.
    """

    epoch: int
    indices: Sequence[Any]
    stream_keys: Sequence[Any]


@final
class StreamedDataset(Dataset[Any]):
    """Load and collate the batch of a :class:`BatchRequest`, with a random stream for each sample.

    The epoch is passed to ``set_epoch`` of the dataset, if it has that method. A dataset with ``__getitems__`` loads the whole
    batch in one call with one stream, which depends on the samples in the batch.

    Args:
        dataset: a map-style dataset.
        collate: the collate function; None to load single samples without collating them.
        seed: the seed of the streams, the same on every rank.
        lazy: whether to seed the generators of NumPy and Python only when they are used. The samples are the same.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None, seed: int, *, lazy: bool = True) -> None:
        self.dataset = dataset
        self.collate = collate
        self._seed = seed
        self._lazy = lazy
        self._stacks = collate is default_collate
        self._at_once = _loads_batches(dataset)
        self._epoch: int | None = None

    def __getitem__(self, request: BatchRequest) -> Any:
        """Load a single sample, for data loaders without batching."""
        self._require_epoch(request)
        generators = begin_seeding(lazy=self._lazy)
        try:
            (sample,) = self._samples(request, generators)
            return sample if self.collate is None else self.collate(sample)
        finally:
            generators.end()

    def __getitems__(self, request: BatchRequest) -> Any:
        """Load a batch; called by the fetcher of torch's ``DataLoader``."""
        self._require_epoch(request)
        generators = begin_seeding(lazy=self._lazy)
        try:
            if self._at_once:
                generators.seed_all(stream_seeds(self._seed, request.epoch, *request.stream_keys))
                samples = self.dataset.__getitems__(list(request.indices))
            else:
                samples = self._samples(request, generators)
            if self.collate is None:
                return samples
            # Stacking draws no numbers, so no generator needs to be seeded.
            batch = stack_samples(samples) if self._stacks else None
            if batch is None:
                generators.seed_all(stream_seeds(self._seed, request.epoch, _BATCH, request.stream_keys[0]))
                batch = self.collate(samples)
            return batch
        finally:
            generators.end()

    def _samples(self, request: BatchRequest, generators: Generators) -> list[Any]:
        """Load the samples of a batch. This is ``seed_all(stream_seeds(...))`` for each sample, with fewer calls."""
        dataset, seed_torch = self.dataset, torch.default_generator.manual_seed
        prefix = f"{self._seed}:{request.epoch}:"
        samples: list[Any] = [None] * len(request.indices)
        for number, (key, index) in enumerate(zip(request.stream_keys, request.indices, strict=True)):
            generators.seeds = seeds = _UNPACK(_HASH(f"{prefix}{key!s}".encode(), digest_size=_SEED_BYTES).digest())
            seed_torch(seeds[2])
            if generators.is_active:
                generators.seed_active()
            samples[number] = dataset[index]
        return samples

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the dataset."""
        self._epoch = epoch
        set_epoch_of(self.dataset, epoch)

    def _require_epoch(self, request: BatchRequest) -> None:
        """Pass the epoch of a request to this copy of the dataset: a worker that persists has a copy from an earlier epoch."""
        if request.epoch != self._epoch:
            self.set_epoch(request.epoch)


def uses_random_numbers(dataset: Any, collate: Callable[[Any], Any] | None) -> bool:
    """Return whether loading may draw random numbers; False only for torch and Python types that never do."""
    if collate not in (None, default_collate, pseudo_collate):
        return True
    kind = type(dataset)
    if kind is Subset:
        return uses_random_numbers(dataset.dataset, None)
    if kind is ConcatDataset:
        return any(uses_random_numbers(part, None) for part in dataset.datasets)
    if kind is StackDataset:
        parts = dataset.datasets
        return any(uses_random_numbers(part, None) for part in (parts.values() if isinstance(parts, dict) else parts))
    return kind not in (TensorDataset, Tensor, np.ndarray, list, tuple, range)


def _loads_batches(dataset: Any) -> bool:
    """Return whether a dataset implements ``__getitems__``; a ``Subset`` always has it, so its dataset is checked."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))
