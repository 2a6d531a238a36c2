"""Batch samplers that start at any position of an epoch, and the requests that they pass to the data loader."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast, final

from torch.utils.data import BatchSampler, Sampler

from stratagem.data.rank_share import IsolatedIterator, RankItems, RankShare, forms_plain_batches, length_of
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
    """Return the number of consumed samples; an upper bound if the last batch was smaller."""
    return sum(size * batches for size, batches in consumed)


def advanced(consumed: ConsumedSamples, size: int, batches: int) -> ConsumedSamples:
    """Return the consumed samples after ``batches`` more batches of ``size`` samples."""
    if batches == 0:
        return consumed
    if consumed and consumed[-1][0] == size:
        return (*consumed[:-1], (size, consumed[-1][1] + batches))
    return (*consumed, (size, batches))


class PositionedBatches(Sampler[list[int]]):
    """Base class of batch samplers with random access.

    Attributes:
        batch_size: samples per batch and rank; the last batch may be smaller.
        rank: the rank of this process.
        world_size: the number of ranks that share the batches.
        endless: whether the sequence of batches is infinite.
        by_batch: whether whole batches, rather than samples, are distributed round-robin over the ranks.
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
        """Return this rank's number of remaining batches in an epoch; all complete epochs have the same number."""

    @abstractmethod
    def requests_from(self, epoch: int, consumed: ConsumedSamples = ()) -> Iterator[BatchRequest]:
        """Yield this rank's remaining batches of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for request in self.requests_from(self._epoch):
            yield list(request.indices)

    def __len__(self) -> int:
        """Return this rank's number of batches per epoch."""
        return self.left()


@final
class RankBatches(PositionedBatches):
    """A rank's batches, formed from the samples of a :class:`PositionedSampler`.

    Args:
        sampler: distributes the samples over the ranks.
        batch_size: samples per batch.
        drop_last: whether to drop the last batch of an epoch if it is smaller than ``batch_size``.
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

    def size_of_last(self, consumed: ConsumedSamples = ()) -> int:
        """Return the number of samples in the last batch of an epoch that continues after ``consumed``."""
        rest = self.sampler.left(num_samples_in(consumed)) % self.batch_size
        return rest if rest and not self._drop_last else self.batch_size

    def requests_from(self, epoch: int, consumed: ConsumedSamples = ()) -> Iterator[BatchRequest]:
        start = num_samples_in(consumed)
        remaining = self.sampler.rank_indices(epoch, start)
        position = start + self.rank
        while indices := list(islice(remaining, self.batch_size)):
            if self._drop_last and len(indices) < self.batch_size:
                return
            next_position = position + len(indices) * self.world_size
            # A sample that is repeated within an epoch gets a different stream each time.
            stream_keys = range(position, next_position, self.world_size) if self.sampler.repeats else indices
            yield BatchRequest(epoch, indices, stream_keys)
            position = next_position


@final
class OpaqueBatches:
    """The batches of a custom sampler or batch sampler, which reaches a position only by iterating to it.

    The samples of a sampler, or the batches of a batch sampler, are distributed round-robin over the ranks. With a sampler, and
    with a batch sampler that forms its batches from a sampler as torch's ``BatchSampler`` does, the batches of all ranks
    together form the batch of a single process with N times the batch size.

    Args:
        sampler: yields lists of indices, or single indices without batching.
        single: whether it yields single indices.
        seed: the seed of the global generators while it is iterated, the same on every rank.
        share: this rank's share; None if the sampler yields only this rank's items.
    """

    def __init__(self, sampler: Iterable[Any], *, single: bool, seed: int, share: RankShare | None) -> None:
        self.sampler = sampler
        self.share = share
        self._single = single
        self._seed = seed
        divides = share is not None and share.size > 1
        self._divided: BatchSampler | None = sampler if divides and forms_plain_batches(sampler) else None
        self._epoch = 0

    @property
    def batch_size(self) -> int | None:
        """Samples per batch; None if the sampler has no ``batch_size``."""
        return getattr(self.sampler, "batch_size", None)

    @property
    def by_batch(self) -> bool:
        """Whether whole batches are distributed round-robin over the ranks."""
        return self.share is not None and self._divided is None and not self._single

    def set_epoch(self, epoch: int) -> None:
        """Call ``set_epoch`` on the sampler and its inner sampler, if they have that method."""
        self._epoch = epoch
        for part in (self.sampler, getattr(self.sampler, "sampler", None)):
            setter = getattr(part, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def requests_from(self, epoch: int, done: int) -> Iterator[BatchRequest]:
        """Yield an epoch's batches after the first ``done``; the indices of skipped batches are drawn but not loaded."""
        self.set_epoch(epoch)
        for item in islice(_drawn_to_the_end(iter(self), length_of(self)), done, None):
            indices: Sequence[Any] = [item] if self._single else item
            yield BatchRequest(epoch, indices, indices)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches, or single indices, of the current epoch."""
        keys = (self._seed, self._epoch, "sampler")
        if self.share is None:
            return IsolatedIterator(self.sampler, *keys)
        divided = self._divided
        if divided is None:
            return RankItems(self.sampler, self.share, *keys)
        if type(divided) is BatchSampler:
            indices = RankItems(divided.sampler, self.share, *keys)
            return iter(BatchSampler(cast("Any", indices), divided.batch_size, divided.drop_last))
        # The iterator of torchdata's class has a state, which includes that of the sampler, so iterate over its batches.
        singles = copy.copy(divided)
        singles.batch_size, singles.drop_last = 1, False
        return _BatchesOfSingles(RankItems(singles, self.share, *keys), divided.batch_size, drop_last=divided.drop_last)

    def __len__(self) -> int:
        if self._divided is None:
            total = len(self.sampler)  # type: ignore[arg-type]  # torch's samplers may have a length
            return total if self.share is None else self.share.count(total)
        share = cast("RankShare", self.share)
        samples, size = share.count(len(self._divided.sampler)), self._divided.batch_size  # type: ignore[arg-type]
        return samples // size if self._divided.drop_last else math.ceil(samples / size)


@final
class _BatchesOfSingles(Iterator[list[Any]]):
    """Joins batches of one sample to larger ones. The state is that of the batches of one sample.

    Args:
        singles: yields this rank's samples, each in a list.
        batch_size: samples per batch.
        drop_last: whether to drop the last batch if it is smaller than ``batch_size``.
    """

    def __init__(self, singles: RankItems, batch_size: int, *, drop_last: bool) -> None:
        self._singles = singles
        self._batch_size = batch_size
        self._drop_last = drop_last

    def __next__(self) -> list[Any]:
        batch = [sample for (sample,) in islice(self._singles, self._batch_size)]
        if not batch or (self._drop_last and len(batch) < self._batch_size):
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {**self._singles.state_dict(), "unit": "sample"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position, also from that of an earlier version, which counted whole batches."""
        if state.get("unit") != "sample":
            first = [[sample] for batch in state["first"] for sample in batch][: len(state["first"])]
            state = {**state, "taken": state["taken"] * self._batch_size, "first": first}
        self._singles.load_state_dict(state)


def _drawn_to_the_end(items: Iterator[Any], length: int | None) -> Iterator[Any]:
    """Yield items. Before yielding the last one, try to draw another item.

    A training loop stops after ``length`` batches, whereas ``for batch in loader`` runs until the sampler is exhausted.
    Some samplers change their state only then: torch's ``RandomSampler`` draws from its generator, which affects the
    next epoch.
    """
    for count, item in enumerate(items, 1):
        following = list(islice(items, 1)) if count == length else []
        yield item
        yield from following


@final
class EpochBatches(Sampler[Any]):
    """The batch sampler of the data loaders that this package builds: yields the requests set before each iteration.

    Args:
        source: the batch sampler that provides the requests.
        streamed: whether to yield a :class:`BatchRequest` for a :class:`StreamedDataset`, rather than indices.
        single: whether the data loader takes one index at a time instead of batching.
    """

    def __init__(self, source: PositionedBatches | OpaqueBatches, *, streamed: bool, single: bool) -> None:
        self.source = source
        self.single = single
        self._streamed = streamed
        self._pending: Iterator[BatchRequest] = iter(())

    @property
    def batch_size(self) -> int | None:
        """Samples per batch on this rank; None without batching, or if it is unknown."""
        return None if self.single else self.source.batch_size

    def copy(self) -> EpochBatches:
        """Return an independent object with the same source."""
        return EpochBatches(self.source, streamed=self._streamed, single=self.single)

    def set_requests(self, requests: Iterator[BatchRequest]) -> None:
        """Set the batches of the next iteration."""
        self._pending = requests

    def __iter__(self) -> Iterator[Any]:
        for request in self._pending:
            if self._streamed:
                yield request
            else:
                yield request.indices[0] if self.single else request.indices

    def __len__(self) -> int:
        return len(self.source)
