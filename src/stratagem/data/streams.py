"""Random numbers of the data: a stream for each sample of each epoch, whoever loads it.

A dataset draws from the global generators of Python, NumPy and torch. Before it is asked for a sample they are seeded
from (seed, epoch, sample), so that an augmentation does not depend on the rank or the worker that makes it, nor on what
was loaded before. In the main process, where dropout draws from the same generators, they get their state back.
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

__all__ = ["BatchRequest", "StreamedDataset", "draws_numbers", "isolate_cpu_rng", "seed_stream", "stream_seed"]

# The stream of what is done with a whole batch, such as mixing its samples in collate_fn.
_BATCH = "batch"


def stream_seed(*keys: object) -> int:
    """Return a 32-bit seed for the stream that ``keys`` name; streams of different keys are unrelated.

    Adding seed and epoch, as is often done, gives epoch 1 of seed 0 the order of epoch 0 of seed 1.
    """
    return int.from_bytes(_digest(keys, 4), "little")


def seed_stream(*keys: object) -> None:
    """Put the global CPU generators of Python, NumPy and torch at the beginning of the stream that ``keys`` name."""
    digest = _digest(keys, 16)
    # A part of its own for each: NumPy and torch make the same numbers of the same seed.
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    # torch.manual_seed also looks for accelerators, which takes a hundred times as long.
    torch.default_generator.manual_seed(int.from_bytes(digest[12:], "little"))


def _digest(keys: tuple[object, ...], size: int) -> bytes:
    return hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=size).digest()


@final
@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A batch that is to be loaded.

    Attributes:
        epoch: whose streams its samples have.
        indices: what the dataset is asked for.
        names: what names each sample's stream within the epoch.
    """

    epoch: int
    indices: Sequence[Any]
    names: Sequence[Any]


@final
class StreamedDataset(Dataset[Any]):
    """Loads the batch of a :class:`BatchRequest`, collated, with a stream of random numbers for each of its samples.

    A dataset with ``__getitems__`` loads the batch at once; then it has one stream, which depends on which samples are
    in the batch.

    Args:
        dataset: is asked for samples by index.
        collate: makes the batch of them; None where samples come as they are, one at a time.
        seed: of the streams, the same on every rank.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self._seed = seed
        self._at_once = _loads_batches(dataset)

    def __getitem__(self, draw: BatchRequest) -> Any:
        """Load the only sample of a draw, for loaders that make no batches."""
        with isolate_cpu_rng():
            sample = self._sample(draw.epoch, draw.names[0], draw.indices[0])
            return sample if self.collate is None else self.collate(sample)

    def __getitems__(self, draw: BatchRequest) -> Any:
        """Load a batch; torch's loader asks for it so."""
        with isolate_cpu_rng():
            samples = self._samples(draw)
            seed_stream(self._seed, draw.epoch, _BATCH, draw.names[0])
            return samples if self.collate is None else self.collate(samples)

    def __len__(self) -> int:
        return len(self.dataset)

    def _samples(self, draw: BatchRequest) -> Any:
        if self._at_once:
            seed_stream(self._seed, draw.epoch, *draw.names)
            return self.dataset.__getitems__(list(draw.indices))
        return [self._sample(draw.epoch, *pair) for pair in zip(draw.names, draw.indices, strict=True)]

    def _sample(self, epoch: int, name: Any, index: Any) -> Any:
        seed_stream(self._seed, epoch, name)
        return self.dataset[index]


def draws_numbers(dataset: Any, collate: Callable[[Any], Any] | None) -> bool:
    """Tell whether loading may draw random numbers; False only for what torch and Python have ready, which does not."""
    if collate not in (None, default_collate, pseudo_collate):
        return True
    kind = type(dataset)
    if kind is Subset:
        return draws_numbers(dataset.dataset, None)
    if kind is ConcatDataset:
        return any(draws_numbers(part, None) for part in dataset.datasets)
    if kind is StackDataset:
        parts = dataset.datasets
        return any(draws_numbers(part, None) for part in (parts.values() if isinstance(parts, dict) else parts))
    return kind not in (TensorDataset, Tensor, np.ndarray, list, tuple, range)


def _loads_batches(dataset: Any) -> bool:
    """Tell whether a dataset gains from being asked for a batch; a subset has the method and may gain nothing."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


# Takes the draws of datasets in the main process, in the place of NumPy's own.
_numpy_stand_in = np.random.MT19937(0)


@contextmanager
def isolate_cpu_rng(stand_in: np.random.MT19937 = _numpy_stand_in) -> Iterator[None]:
    """Give back the states of the CPU's generators at the end, unless this is a worker, where nothing else draws.

    NumPy draws from ``stand_in`` meanwhile.
    """
    if get_worker_info() is not None:
        yield
        return
    python, generator = random.getstate(), torch.default_generator.get_state()
    # Reading and writing NumPy's state takes 160 us, exchanging the generator 2 us. All that it loses is the second of a
    # pair of normal numbers, where np.random.randn was asked for one.
    numpy = get_bit_generator()
    set_bit_generator(stand_in)
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(numpy)
        torch.default_generator.set_state(generator)
