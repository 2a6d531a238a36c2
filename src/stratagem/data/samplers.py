"""Samplers whose order is a pure function of (seed, epoch, global position), distributed round-robin over the ranks.

The order does not depend on workers, restarts or earlier epochs. Rank ``r`` of ``n`` gets the global positions
``r, r + n, r + 2n, ...``, so the batches of all ranks together form the batch of a single process with ``n`` times the
batch size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sized
from itertools import cycle, islice
from typing import Any, ClassVar, final

import torch
from torch.utils.data import DistributedSampler, Sampler

from stratagem.data.streams import stream_seed
from stratagem.distributed import get_dist_info
from stratagem.errors import ConfigValueError

__all__ = ["DefaultSampler", "InfiniteSampler", "PositionedSampler", "epoch_order"]


def epoch_order(length: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Return the indices of an epoch in global order."""
    if not shuffle:
        return list(range(length))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


class PositionedSampler(Sampler[int]):
    """Base class of samplers with random access: they can resume at any position, with any number of ranks.

    Subclasses implement :attr:`samples` and :meth:`order`.

    Args:
        round_up: whether to pad an epoch from the beginning of its order, so that every rank has the same number of
            samples. Training requires it; evaluation must not see a sample twice.
        rank: the rank of this process; by default its rank in the process group.
        world_size: the number of ranks; by default the size of the process group.

    Attributes:
        endless: whether the order is infinite, regardless of its length.
        repeats: whether an epoch may contain a sample more than once.
    """

    endless: ClassVar[bool] = False
    repeats: bool = False

    def __init__(self, *, round_up: bool = True, rank: int | None = None, world_size: int | None = None) -> None:
        here, size = get_dist_info()
        self.round_up = round_up
        self.rank = here if rank is None else rank
        self.world_size = size if world_size is None else world_size
        self._epoch = 0

    @property
    @abstractmethod
    def samples(self) -> int:
        """The number of samples per epoch over all ranks, without padding."""

    @abstractmethod
    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch in global order. It must be deterministic and equal on all ranks."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        self._epoch = epoch

    def rank_indices(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Return this rank's indices, starting at global position ``start``."""
        order = self.order(epoch)
        rest = order[start:]
        if self.round_up and rest:
            rest += islice(cycle(order), -len(rest) % self.world_size)
        return iter(rest[self.rank :: self.world_size])

    def left(self, start: int = 0) -> int:
        """Return this rank's number of samples in an epoch, starting at global position ``start``."""
        rest = max(0, self.samples - start)
        return math.ceil(rest / self.world_size) if self.round_up else len(range(self.rank, rest, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return self.rank_indices(self._epoch)

    def __len__(self) -> int:
        """Return this rank's number of samples per epoch."""
        return self.left()


@final
class UnpaddedSampler(Sampler[int]):
    """The samples of torch's ``DistributedSampler`` without its padding.

    Args:
        sampler: this rank's sampler.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        # The padding is at the end of the global order, from which each rank takes every num_replicas-th sample.
        return islice(iter(self.sampler), len(self))

    def __len__(self) -> int:
        sampler = self.sampler
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]


@final
class DefaultSampler(PositionedSampler):
    """Yield each sample once per epoch, shuffled or in order.

    Args:
        dataset: the dataset; only its length is used.
        shuffle: whether to shuffle the samples in every epoch.
        seed: the random seed, the same on every rank; 0 by default.
        round_up: see :class:`PositionedSampler`, also for ``rank`` and ``world_size``.
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
        super().__init__(round_up=round_up, rank=rank, world_size=world_size)
        self._length = len(dataset)
        self._shuffle = shuffle
        self._seed = seed or 0

    @property
    def samples(self) -> int:
        return self._length

    def order(self, epoch: int) -> list[int]:
        return epoch_order(self._length, seed=self._seed, epoch=epoch, shuffle=self._shuffle)


@final
class InfiniteSampler(PositionedSampler):
    """Iterate over the dataset indefinitely in one order, for iteration-based training.

    Args:
        dataset: the dataset; only its length is used.
        shuffle: whether to shuffle the samples in every pass.
        seed: the random seed, the same on every rank; 0 by default.
        rank: the rank of this process; by default its rank in the process group.
        world_size: the number of ranks; by default the size of the process group.

    Raises:
        ConfigValueError: if the dataset is empty.
    """

    endless = True
    repeats = True

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(round_up=False, rank=rank, world_size=world_size)
        self._length = len(dataset)
        if self._length == 0:
            raise ConfigValueError("InfiniteSampler: the dataset is empty.")
        self._shuffle = shuffle
        self._seed = seed or 0

    @property
    def samples(self) -> int:
        return self._length

    def order(self, epoch: int) -> list[int]:
        """Return the order of one pass."""
        return epoch_order(self._length, seed=self._seed, epoch=epoch, shuffle=self._shuffle)

    def rank_indices(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Yield this rank's indices, starting at global position ``start``; all passes together form epoch 0."""
        position = start + self.rank
        while True:
            passes, index = divmod(position, self._length)
            yield from self.order(passes)[index :: self.world_size]
            position += len(range(index, self._length, self.world_size)) * self.world_size

    def __iter__(self) -> Iterator[int]:
        return self.rank_indices(0)

    def __len__(self) -> int:
        """Return the number of samples in one pass over all ranks, as MMEngine does."""
        return self._length
