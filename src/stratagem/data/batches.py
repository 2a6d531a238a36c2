"""Which samples each batch of an epoch has, from any place in the epoch on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, final

from torch.utils.data import Sampler

from stratagem.data.samplers import PositionedSampler
from stratagem.data.streams import Draw

__all__ = ["DealtBatches", "EpochBatches", "ForeignBatches", "PositionedBatches", "Taken", "and_then", "samples_of"]

# What of an epoch was taken: (samples of a batch, batches of all ranks), in the order in which it was taken. There is one
# such pair, unless the batch size changed on the way. It says nothing of ranks, so any number of them can go on from it.
Taken = tuple[tuple[int, int], ...]


def samples_of(taken: Taken) -> int:
    """Return how many samples were taken; the last batches may have been shorter."""
    return sum(size * batches for size, batches in taken)


def and_then(taken: Taken, size: int, batches: int) -> Taken:
    """Return what is taken when so many batches more are."""
    if batches == 0:
        return taken
    if taken and taken[-1][0] == size:
        return (*taken[:-1], (size, taken[-1][1] + batches))
    return (*taken, (size, batches))


class PositionedBatches(Sampler[list[int]]):
    """Batches of samples whose order is known without being walked through.

    Attributes:
        batch_size: samples of a batch of one rank; the last ones may be shorter.
        rank: this process's.
        world_size: how many ranks take batches in turn.
        endless: whether the batches go on without end.
    """

    endless: bool = False
    batch_size: int
    rank: int
    world_size: int
    _epoch = 0

    @abstractmethod
    def left(self, epoch: int = 0, taken: Taken = ()) -> int:
        """Return how many batches of an epoch this rank has after those that were taken; all whole epochs have as many."""

    @abstractmethod
    def draws(self, epoch: int, taken: Taken = ()) -> Iterator[Draw]:
        """Return this rank's batches of an epoch after those that were taken."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration takes."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for draw in self.draws(self._epoch):
            yield list(draw.indices)

    def __len__(self) -> int:
        """Return how many batches this rank has in a whole epoch."""
        return self.left()


@final
class DealtBatches(PositionedBatches):
    """The samples of a :class:`PositionedSampler`, so many at a time.

    Args:
        sampler: deals them to the ranks.
        batch_size: samples of a batch.
        drop_last: whether the last batch of an epoch is left out where it would be shorter.
    """

    def __init__(self, sampler: PositionedSampler, batch_size: int, *, drop_last: bool) -> None:
        self.batch_size = batch_size
        self.rank, self.world_size = sampler.rank, sampler.world_size
        self.endless = sampler.endless
        self._sampler = sampler
        self._drop_last = drop_last

    def left(self, epoch: int = 0, taken: Taken = ()) -> int:
        if self.endless:
            return math.ceil(len(self._sampler) / self.batch_size)
        samples = self._sampler.left(samples_of(taken))
        return samples // self.batch_size if self._drop_last else math.ceil(samples / self.batch_size)

    def draws(self, epoch: int, taken: Taken = ()) -> Iterator[Draw]:
        start = samples_of(taken)
        dealt = self._sampler.dealt(epoch, start)
        position = start + self.rank
        while indices := list(islice(dealt, self.batch_size)):
            if self._drop_last and len(indices) < self.batch_size:
                return
            following = position + len(indices) * self.world_size
            # A sample that comes again in the same epoch has another stream.
            names = range(position, following, self.world_size) if self._sampler.repeats else indices
            yield Draw(epoch, indices, names)
            position = following


@final
class ForeignBatches:
    """The batches of a batch sampler or a sampler that is not ours: where it stands is known only by walking.

    Args:
        sampler: yields lists of indices, or single ones where there are no batches.
    """

    def __init__(self, sampler: Iterable[Any], *, single: bool) -> None:
        self.sampler = sampler
        self._single = single

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, where the sampler says it."""
        return getattr(self.sampler, "batch_size", None)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, and the one that it takes from, of an epoch, where they want to know."""
        for part in (self.sampler, getattr(self.sampler, "sampler", None)):
            setter = getattr(part, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def draws(self, epoch: int, done: int) -> Iterator[Draw]:
        """Yield the batches of an epoch after the first ``done``, which are drawn but not loaded."""
        self.set_epoch(epoch)
        for item in islice(self.sampler, done, None):
            indices: Sequence[Any] = [item] if self._single else item
            yield Draw(epoch, indices, indices)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # torch's samplers may have a length


@final
class EpochBatches(Sampler[Any]):
    """What a ``DataLoader`` of ours takes its batches from: a stretch of an epoch, chosen before each iteration.

    Args:
        source: whose batches these are.
        streamed: whether the dataset takes a :class:`Draw`, or indices.
        single: whether the loader makes no batches, and takes one index at a time.
    """

    def __init__(self, source: PositionedBatches | ForeignBatches, *, streamed: bool, single: bool) -> None:
        self.source = source
        self.single = single
        self._streamed = streamed
        self._stretch: Iterator[Draw] = iter(())

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch of this rank; None where there are no batches, or nobody says it."""
        return None if self.single else self.source.batch_size

    def choose(self, stretch: Iterator[Draw]) -> None:
        """Have the next iteration take these batches."""
        self._stretch = stretch

    def __iter__(self) -> Iterator[Any]:
        for draw in self._stretch:
            if self._streamed:
                yield draw
            else:
                yield draw.indices[0] if self.single else draw.indices

    def __len__(self) -> int:
        return len(self.source)
