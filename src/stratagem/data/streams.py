"""Random numbers for data loading: one stream per sample and epoch, independent of the process that loads the sample.

Datasets draw from the global generators of Python, NumPy and torch. Before each sample is loaded, they are seeded from
(seed, epoch, sample), so augmentations do not depend on the rank, the worker or the previously loaded samples. In the main
process, where dropout uses the same generators, their state is restored afterwards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from stratagem.data.collate import pseudo_collate
from stratagem.data.epochs import set_epoch_of

__all__ = ["BatchRequest", "StreamedDataset", "uses_random_numbers", "isolate_cpu_rng", "seed_stream", "stream_seed"]

# The stream for operations on a whole batch, such as mixing its samples in collate_fn.
_BATCH = "batch"


def stream_seed(*keys: object) -> int:
    """Return a 32-bit seed for the stream identified by ``keys``; streams of different keys are independent.

    With the common scheme ``seed + epoch``, epoch 1 of seed 0 would have the same order as epoch 0 of seed 1.
    """
    return int.from_bytes(_digest(keys, 4), "little")


def seed_stream(*keys: object) -> None:
    """Seed the global CPU generators of Python, NumPy and torch for the stream identified by ``keys``."""
    digest = _digest(keys, 16)
    # Use different bytes for each: NumPy and torch generate the same numbers from the same seed.
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    # torch.manual_seed also seeds accelerators, which takes a hundred times as long.
    torch.default_generator.manual_seed(int.from_bytes(digest[12:], "little"))


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
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self._seed = seed
        self._at_once = _loads_batches(dataset)
        self._epoch: int | None = None

    def __getitem__(self, request: BatchRequest) -> Any:
        """Load a single sample, for data loaders without batching."""
        self._require_epoch(request)
        with isolate_cpu_rng():
            sample = self._sample(request.epoch, request.stream_keys[0], request.indices[0])
            return sample if self.collate is None else self.collate(sample)

    def __getitems__(self, request: BatchRequest) -> Any:
        """Load a batch; called by the fetcher of torch's ``DataLoader``."""
        self._require_epoch(request)
        with isolate_cpu_rng():
            samples = self._samples(request)
            seed_stream(self._seed, request.epoch, _BATCH, request.stream_keys[0])
            return samples if self.collate is None else self.collate(samples)

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

    def _samples(self, request: BatchRequest) -> Any:
        if self._at_once:
            seed_stream(self._seed, request.epoch, *request.stream_keys)
            return self.dataset.__getitems__(list(request.indices))
        return [self._sample(request.epoch, *pair) for pair in zip(request.stream_keys, request.indices, strict=True)]

    def _sample(self, epoch: int, stream_key: Any, index: Any) -> Any:
        seed_stream(self._seed, epoch, stream_key)
        return self.dataset[index]


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


# Replaces NumPy's global bit generator while a dataset loads samples in the main process.
_numpy_bit_generator = np.random.MT19937(0)


@contextmanager
def isolate_cpu_rng(bit_generator: np.random.MT19937 = _numpy_bit_generator) -> Iterator[None]:
    """Restore the state of the global CPU generators on exit. In a data worker, where nothing else uses them, do nothing.

    Within the block, NumPy draws from ``bit_generator``.
    """
    if get_worker_info() is not None:
        yield
        return
    python, generator = random.getstate(), torch.default_generator.get_state()
    # Replacing NumPy's bit generator takes 2 us, whereas saving and restoring its state takes 160 us. The replacement
    # discards only the spare normal number that np.random.randn may have cached.
    numpy = get_bit_generator()
    set_bit_generator(bit_generator)
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(numpy)
        torch.default_generator.set_state(generator)
