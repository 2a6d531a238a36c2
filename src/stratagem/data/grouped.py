"""Batches that hold samples of one group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from stratagem.data.batches import ConsumedSamples, PositionedBatches
from stratagem.data.sample_values import per_sample_values
from stratagem.data.samplers import epoch_order
from stratagem.data.streams import BatchRequest, stream_seed
from stratagem.distributed import get_dist_info
from stratagem.errors import ConfigValueError

__all__ = ["GroupedBatchSampler"]


@final
class GroupedBatchSampler(PositionedBatches):
    """Batches each of which has samples of one group only: images of one shape, texts of about one length.

    An epoch's samples are shuffled, those of each group are cut into batches in that order, and the batches are shuffled.
    A group's last batch may be shorter. The ranks take the batches in turn, so at the same time they may have batches of
    different groups. After a change of the batch size inside of an epoch, what is left is cut anew.

    Args:
        dataset: what is sampled.
        batch_size: samples of a batch.
        groups: the group of each sample, a number or a name; or the name of the dataset's attribute or method that has
            them.
        bounds: rising numbers between which a group lies, where ``groups`` are measures: ``[1.0]`` parts aspect ratios
            into those below 1 and the rest, ``[64, 128]`` lengths into three.
        shuffle: whether each epoch has its own random order; else the batches of the first group come first.
        drop_last: whether a group's last batch is left out where it would be shorter.
        seed: of the shuffling, the same on every rank; 0 where not given.
        round_up: whether batches are repeated so that every rank has as many.
        rank: this process's rank; that of the process group where not given.
        world_size: the number of ranks; likewise.

    Raises:
        ConfigValueError: if there is not one group for each sample, or the bounds do not rise.
        ConfigTypeError: if the groups are no sequence of plain values.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        groups: Sequence[Any] | str,
        bounds: Sequence[float] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
        round_up: bool = True,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        here, size = get_dist_info()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigValueError(f"GroupedBatchSampler: batch_size is {batch_size!r}; at least 1 is due.")
        self.batch_size = batch_size
        self.rank = here if rank is None else rank
        self.world_size = size if world_size is None else world_size
        self._groups = _numbered(per_sample_values(groups, dataset, "groups"), bounds)
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._seed = seed or 0
        self.round_up = round_up

    def left(self, epoch: int = 0, consumed: ConsumedSamples = ()) -> int:
        rest = len(self._rest(epoch, consumed)) if consumed else self._batches_of_an_epoch()
        return math.ceil(rest / self.world_size) if self.round_up else len(range(self.rank, rest, self.world_size))

    def requests_from(self, epoch: int, consumed: ConsumedSamples = ()) -> Iterator[BatchRequest]:
        batches = self._rest(epoch, consumed)
        if self.round_up and batches:
            batches += islice(cycle(self._rest(epoch, ())), -len(batches) % self.world_size)
        for batch in batches[self.rank :: self.world_size]:
            indices = batch.tolist()
            yield BatchRequest(epoch, indices, indices)

    def _batches_of_an_epoch(self) -> int:
        sizes = np.bincount(self._groups)
        return int((sizes // self.batch_size if self._drop_last else -(-sizes // self.batch_size)).sum())

    def _rest(self, epoch: int, consumed: ConsumedSamples) -> list[NDArray[np.int64]]:
        """Return the batches of all ranks that are left of an epoch."""
        order = epoch_order(len(self._groups), seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        samples = np.array(order, dtype=np.int64)
        for number, (size, count) in enumerate(consumed):
            batches = self._cut(samples, size, epoch, number)
            if size == self.batch_size and number == len(consumed) - 1:
                return batches[count:]
            samples = samples[~np.isin(samples, np.concatenate([samples[:0], *batches[:count]]))]
        return self._cut(samples, self.batch_size, epoch, len(consumed))

    def _cut(self, samples: NDArray[np.int64], size: int, epoch: int, number: int) -> list[NDArray[np.int64]]:
        """Cut samples into batches of one group each; ``number`` counts the cuts of an epoch."""
        groups = self._groups[samples]
        ends = np.flatnonzero(np.diff(np.sort(groups))) + 1
        batches = [
            group[start : start + size]
            for group in np.split(samples[np.argsort(groups, kind="stable")], ends)
            for start in range(0, len(group), size)
        ]
        if self._drop_last:
            batches = [batch for batch in batches if len(batch) == size]
        # Not the stream of the samples' own order.
        seed = stream_seed(self._seed, "batches", number)
        return [batches[i] for i in epoch_order(len(batches), seed=seed, epoch=epoch, shuffle=self._shuffle)]


def _numbered(values: NDArray[Any], bounds: Sequence[float] | None) -> NDArray[np.int64]:
    """Return a whole number from 0 on for each sample's group."""
    if bounds is not None:
        edges = np.asarray(bounds, dtype=np.float64)
        if edges.ndim != 1 or not np.all(np.diff(edges) > 0):
            raise ConfigValueError(f"GroupedBatchSampler: bounds={list(bounds)!r} do not rise.")
        if not np.issubdtype(values.dtype, np.number):
            raise ConfigValueError(f"GroupedBatchSampler: bounds part numbers, and the groups are {values.dtype}.")
        values = np.searchsorted(edges, values, side="right")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
