"""The order of data: a pure function of (seed, epoch, global index), dealt to the ranks in turn.

Nothing here depends on workers, restarts or what ran before. Rank ``r`` of ``n`` takes the global positions
``r, r + n, r + 2n ...``, so the batches of all ranks together are the batch of one process that is ``n`` times as large.
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
    """Return the indices of one epoch, in their global order."""
    if not shuffle:
        return list(range(length))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


class PositionedSampler(Sampler[int]):
    """A sampler whose order is known without being walked through, so that it can be taken up anywhere, by any ranks.

    A sampler derived from it says how many samples an epoch has and in which order, and has the rest from here.

    Args:
        round_up: whether an epoch is filled up from the beginning of its order so that every rank has as many samples.
            Training needs that; evaluation must not see a sample twice.
        rank: this process's rank; that of the process group where not given.
        world_size: the number of ranks; likewise.

    Attributes:
        endless: whether the order goes on without end, whatever its length says.
        repeats: whether an epoch may have a sample more than once.
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
        """How many samples an epoch has over all ranks, without any filling."""

    @abstractmethod
    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch in the order of all ranks together: the same whoever asks, and how often."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self._epoch = epoch

    def rank_indices(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Return this rank's indices after the first ``start`` of the order of all ranks."""
        order = self.order(epoch)
        rest = order[start:]
        if self.round_up and rest:
            rest += islice(cycle(order), -len(rest) % self.world_size)
        return iter(rest[self.rank :: self.world_size])

    def left(self, start: int = 0) -> int:
        """Return how many samples of an epoch this rank has after the first ``start`` of all ranks."""
        rest = max(0, self.samples - start)
        return math.ceil(rest / self.world_size) if self.round_up else len(range(self.rank, rest, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return self.rank_indices(self._epoch)

    def __len__(self) -> int:
        """Return how many samples this rank has in a whole epoch."""
        return self.left()


@final
class UnpaddedSampler(Sampler[int]):
    """The samples of torch's ``DistributedSampler`` without those that it repeats to give every rank the same number.

    Args:
        sampler: of this rank.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        # It appends the repeated samples to the order and gives each rank every num_replicas-th sample.
        return islice(iter(self.sampler), len(self))

    def __len__(self) -> int:
        sampler = self.sampler
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]


@final
class DefaultSampler(PositionedSampler):
    """Each sample once an epoch, shuffled or in order.

    Args:
        dataset: what is sampled; only its length counts.
        shuffle: whether each epoch has its own random order.
        seed: of the shuffling, the same on every rank; 0 where not given.
        round_up: see :class:`PositionedSampler`; so are ``rank`` and ``world_size``.
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
            raise ConfigValueError("InfiniteSampler: the dataset is empty, so it has no infinite order.")
        self._shuffle = shuffle
        self._seed = seed or 0

    @property
    def samples(self) -> int:
        return self._length

    def order(self, epoch: int) -> list[int]:
        """Return the order of one pass."""
        return epoch_order(self._length, seed=self._seed, epoch=epoch, shuffle=self._shuffle)

    def rank_indices(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Yield this rank's indices after the first ``start`` of all passes; the passes are one sequence of epoch 0."""
        position = start + self.rank
        while True:
            passes, index = divmod(position, self._length)
            yield from self.order(passes)[index :: self.world_size]
            position += len(range(index, self._length, self.world_size)) * self.world_size

    def __iter__(self) -> Iterator[int]:
        return self.rank_indices(0)

    def __len__(self) -> int:
        """Return the length of one pass over all ranks, as configurations written for others expect."""
        return self._length
