"""Which samples each batch of an epoch has, from any place in the epoch on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast, final

from torch.utils.data import BatchSampler, Sampler

from stratagem.data.rank_share import IsolatedIterator, RankItems, RankShare
from stratagem.data.samplers import PositionedSampler
from stratagem.data.streams import BatchRequest

__all__ = [
    "RankBatches",
    "EpochBatches",
    "OpaqueBatches",
    "PositionedBatches",
    "ConsumedSamples",
    "advanced",
    "num_samples_in",
]

# The consumed part of an epoch: pairs (samples per batch, batches over all ranks) in order. There is one pair unless the
# batch size changed within the epoch. It is independent of the number of ranks, so a run can resume with any number.
ConsumedSamples = tuple[tuple[int, int], ...]


def num_samples_in(consumed: ConsumedSamples) -> int:
    """Return how many samples were taken; the last batches may have been shorter."""
    return sum(size * batches for size, batches in consumed)


def advanced(consumed: ConsumedSamples, size: int, batches: int) -> ConsumedSamples:
    """Return what is taken when so many batches more are."""
    if batches == 0:
        return consumed
    if consumed and consumed[-1][0] == size:
        return (*consumed[:-1], (size, consumed[-1][1] + batches))
    return (*consumed, (size, batches))


class PositionedBatches(Sampler[list[int]]):
    """Batches of samples whose order is known without being walked through.

    Attributes:
        batch_size: samples of a batch of one rank; the last ones may be shorter.
        rank: this process's.
        world_size: how many ranks take batches in turn.
        endless: whether the batches go on without end.
        by_batch: whether the ranks take turns at whole batches, rather than at samples.
        round_up: whether batches are repeated so that every rank has the same number.
    """

    endless: bool = False
    by_batch: bool = True
    round_up: bool = True
    batch_size: int
    rank: int
    world_size: int
    _epoch = 0

    @abstractmethod
    def left(self, epoch: int = 0, consumed: ConsumedSamples = ()) -> int:
        """Return how many batches of an epoch this rank has after those that were taken; all whole epochs have as many."""

    @abstractmethod
    def requests_from(self, epoch: int, consumed: ConsumedSamples = ()) -> Iterator[BatchRequest]:
        """Return this rank's batches of an epoch after those that were taken."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration takes."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for draw in self.requests_from(self._epoch):
            yield list(draw.indices)

    def __len__(self) -> int:
        """Return how many batches this rank has in a whole epoch."""
        return self.left()


@final
class RankBatches(PositionedBatches):
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
        self.by_batch = False
        self.sampler = sampler
        self._drop_last = drop_last

    def left(self, epoch: int = 0, consumed: ConsumedSamples = ()) -> int:
        if self.endless:
            return math.ceil(len(self.sampler) / self.batch_size)
        samples = self.sampler.left(num_samples_in(consumed))
        return samples // self.batch_size if self._drop_last else math.ceil(samples / self.batch_size)

    def requests_from(self, epoch: int, consumed: ConsumedSamples = ()) -> Iterator[BatchRequest]:
        start = num_samples_in(consumed)
        rank_indices = self.sampler.rank_indices(epoch, start)
        position = start + self.rank
        while indices := list(islice(rank_indices, self.batch_size)):
            if self._drop_last and len(indices) < self.batch_size:
                return
            following = position + len(indices) * self.world_size
            # A sample that comes again in the same epoch has another stream.
            names = range(position, following, self.world_size) if self.sampler.repeats else indices
            yield BatchRequest(epoch, indices, names)
            position = following


@final
class OpaqueBatches:
    """The batches of a sampler or a batch sampler that is not built in: its position is known only by iterating it.

    The ranks take turns: at the samples of a sampler, so that the batches of all ranks together are the batch of one
    process that is N times as large, or at the batches of a batch sampler.

    Args:
        sampler: yields lists of indices, or single ones if there are no batches.
        single: whether it yields single indices.
        seed: of the random numbers that it draws from the global generators, the same on every rank.
        share: which part of it this rank takes; None if it yields this rank's part already.
    """

    def __init__(self, sampler: Iterable[Any], *, single: bool, seed: int, share: RankShare | None) -> None:
        self.sampler = sampler
        self.share = share
        self._single = single
        self._seed = seed
        divided = share is not None and share.size > 1 and type(sampler) is BatchSampler
        self._divided: BatchSampler | None = cast("BatchSampler", sampler) if divided else None
        self._epoch = 0

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, if the sampler reports it."""
        return getattr(self.sampler, "batch_size", None)

    @property
    def by_batch(self) -> bool:
        """Whether the ranks take turns at whole batches."""
        return self.share is not None and self._divided is None and not self._single

    def set_epoch(self, epoch: int) -> None:
        """Report the epoch to the sampler, and to the one that it takes from, if they have ``set_epoch``."""
        self._epoch = epoch
        for part in (self.sampler, getattr(self.sampler, "sampler", None)):
            setter = getattr(part, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def requests_from(self, epoch: int, done: int) -> Iterator[BatchRequest]:
        """Yield the batches of an epoch after the first ``done``, which are drawn but not loaded."""
        self.set_epoch(epoch)
        for item in islice(self, done, None):
            indices: Sequence[Any] = [item] if self._single else item
            yield BatchRequest(epoch, indices, indices)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches, or single indices, of the epoch that was set last."""
        keys = (self._seed, self._epoch, "sampler")
        if self.share is None:
            return IsolatedIterator(self.sampler, *keys)
        if self._divided is None:
            return RankItems(self.sampler, self.share, *keys)
        indices = RankItems(self._divided.sampler, self.share, *keys)
        return iter(BatchSampler(cast("Any", indices), self._divided.batch_size, self._divided.drop_last))

    def __len__(self) -> int:
        if self._divided is None:
            total = len(self.sampler)  # type: ignore[arg-type]  # torch's samplers may have a length
            return total if self.share is None else self.share.count(total)
        share = cast("RankShare", self.share)
        samples, size = share.count(len(self._divided.sampler)), self._divided.batch_size  # type: ignore[arg-type]
        return samples // size if self._divided.drop_last else math.ceil(samples / size)


@final
class EpochBatches(Sampler[Any]):
    """What a ``DataLoader`` of ours takes its batches from: a stretch of an epoch, chosen before each iteration.

    Args:
        source: whose batches these are.
        streamed: whether the dataset takes a :class:`BatchRequest`, or indices.
        single: whether the loader makes no batches, and takes one index at a time.
    """

    def __init__(self, source: PositionedBatches | OpaqueBatches, *, streamed: bool, single: bool) -> None:
        self.source = source
        self.single = single
        self._streamed = streamed
        self._pending: Iterator[BatchRequest] = iter(())

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch of this rank; None where there are no batches, or nobody says it."""
        return None if self.single else self.source.batch_size

    def set_requests(self, requests: Iterator[BatchRequest]) -> None:
        """Have the next iteration take these batches."""
        self._pending = requests

    def __iter__(self) -> Iterator[Any]:
        for draw in self._pending:
            if self._streamed:
                yield draw
            else:
                yield draw.indices[0] if self.single else draw.indices

    def __len__(self) -> int:
        return len(self.source)
