"""The order of data: a pure function of (seed, epoch, global index), dealt to the ranks in turn.

Nothing here depends on workers, restarts or what ran before. Rank ``r`` of ``n`` takes the global positions
``r, r + n, r + 2n ...``, so the batches of all ranks together are the batch of one process that is ``n`` times as large.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sized
from typing import ClassVar, final

import torch
from torch.utils.data import Sampler

from stratagem.dist import get_dist_info
from stratagem.errors import ConfigValueError

__all__ = ["DefaultSampler", "InfiniteSampler", "PositionedSampler", "epoch_order", "stream_seed"]


def stream_seed(*keys: int) -> int:
    """Return a 32-bit seed for the stream that ``keys`` name; streams of different keys are unrelated.

    Adding seed and epoch, as is often done, gives epoch 1 of seed 0 the order of epoch 0 of seed 1.
    """
    digest = hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


def epoch_order(length: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Return the indices of one epoch, in their global order."""
    if not shuffle:
        return list(range(length))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


class PositionedSampler(Sampler[int]):
    """A sampler that can be told its epoch and start anywhere in it, at no cost.

    Samplers derived from it let a run that was stopped in the middle of an epoch go on with the next sample.

    Attributes:
        endless: whether the order goes on without end, whatever its length says.
    """

    endless: ClassVar[bool] = False

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""

    @abstractmethod
    def set_start(self, samples: int) -> None:
        """Leave out the first ``samples`` of the global order (of all ranks together) in the next iteration."""


@final
class DefaultSampler(PositionedSampler):
    """Each sample once an epoch, shuffled or in order.

    Args:
        dataset: what is sampled; only its length counts.
        shuffle: whether each epoch has its own random order.
        seed: of the shuffling, the same on every rank; 0 where not given.
        round_up: whether the order is filled up from its beginning so that every rank has as many samples. Training
            needs that; evaluation must not see a sample twice.
        rank: this process's rank; that of the process group where not given.
        world_size: the number of ranks; likewise.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        here, size = get_dist_info()
        self._length = len(dataset)
        self._shuffle = shuffle
        self._seed = seed or 0
        self._round_up = round_up
        self._rank = here if rank is None else rank
        self._size = size if world_size is None else world_size
        self._epoch = 0
        self._start = 0

    @property
    def samples(self) -> int:
        """How many samples an epoch has over all ranks, the filling included."""
        return math.ceil(self._length / self._size) * self._size if self._round_up else self._length

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def set_start(self, samples: int) -> None:
        if not 0 <= samples <= self.samples:
            raise ConfigValueError(f"An epoch of {self.samples} samples cannot start after {samples} of them.")
        self._start = samples

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self._length, seed=self._seed, epoch=self._epoch, shuffle=self._shuffle)
        while order and len(order) < self.samples:
            order += order[: self.samples - len(order)]
        start, self._start = self._start, 0
        return iter(order[start + self._rank :: self._size])

    def __len__(self) -> int:
        """Return how many samples this rank has in a whole epoch."""
        return len(range(self._rank, self.samples, self._size))


@final
class InfiniteSampler(PositionedSampler):
    """The epochs' orders one after the other without end, for training by iterations.

    Args:
        dataset: what is sampled; only its length counts.
        shuffle: whether each pass has its own random order.
        seed: of the shuffling, the same on every rank; 0 where not given.
        rank: this process's rank; that of the process group where not given.
        world_size: the number of ranks; likewise.

    Raises:
        ConfigValueError: if the dataset is empty.
    """

    endless = True

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        here, size = get_dist_info()
        self._length = len(dataset)
        if self._length == 0:
            raise ConfigValueError("InfiniteSampler: the dataset is empty, so it has no infinite order.")
        self._shuffle = shuffle
        self._seed = seed or 0
        self._rank = here if rank is None else rank
        self._size = size if world_size is None else world_size
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the passes follow each other in one sequence."""

    def set_start(self, samples: int) -> None:
        if samples < 0:
            raise ConfigValueError(f"An order cannot start after {samples} samples.")
        self._start = samples

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        position = start + self._rank
        while True:
            epoch, index = divmod(position, self._length)
            order = epoch_order(self._length, seed=self._seed, epoch=epoch, shuffle=self._shuffle)
            yield from order[index :: self._size]
            position += len(range(index, self._length, self._size)) * self._size

    def __len__(self) -> int:
        """Return the length of one pass over all ranks, as configurations written for others expect."""
        return self._length
