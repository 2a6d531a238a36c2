"""A batch sampler whose batches contain samples of one group."""

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
    """Yield batches whose samples all belong to one group, such as images of one shape or texts of similar length.

    In every epoch, the samples are shuffled, the samples of each group are split into batches in that order, and the
    batches are shuffled. The last batch of a group may be smaller. Batches are distributed round-robin over the ranks, so
    ranks may process batches of different groups at the same time. If the batch size changes within an epoch, the
    remaining samples are split again.

    Args:
        dataset: the dataset.
        batch_size: samples per batch.
        groups: the group of each sample, a number or a name; or the name of a dataset attribute or method.
        bounds: increasing boundaries that divide ``groups`` into intervals if they are measurements: ``[1.0]`` divides
            aspect ratios into those below 1 and the rest, ``[64, 128]`` divides lengths into three groups.
        shuffle: whether to shuffle in every epoch; otherwise the batches are ordered by group.
        drop_last: whether to drop the last batch of a group if it is smaller.
        seed: the random seed, the same on every rank; 0 by default.
        round_up: whether to repeat batches so that every rank has the same number.
        rank: the rank of this process; by default its rank in the process group.
        world_size: the number of ranks; by default the size of the process group.

    Raises:
        ConfigValueError: if the number of groups differs from the number of samples, or the bounds do not increase.
        ConfigTypeError: if the groups are not a one-dimensional sequence.
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
            raise ConfigValueError(
                f"GroupedBatchSampler: batch_size is {batch_size!r}; expected an integer of at least 1."
            )
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
        """Return the remaining batches of an epoch over all ranks."""
        order = epoch_order(len(self._groups), seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        samples = np.array(order, dtype=np.int64)
        for number, (size, count) in enumerate(consumed):
            batches = self._split(samples, size, epoch, number)
            if size == self.batch_size and number == len(consumed) - 1:
                return batches[count:]
            samples = samples[~np.isin(samples, np.concatenate([samples[:0], *batches[:count]]))]
        return self._split(samples, self.batch_size, epoch, len(consumed))

    def _split(self, samples: NDArray[np.int64], size: int, epoch: int, number: int) -> list[NDArray[np.int64]]:
        """Split samples into batches of one group each; ``number`` counts the splits of an epoch."""
        groups = self._groups[samples]
        ends = np.flatnonzero(np.diff(np.sort(groups))) + 1
        batches = [
            group[start : start + size]
            for group in np.split(samples[np.argsort(groups, kind="stable")], ends)
            for start in range(0, len(group), size)
        ]
        if self._drop_last:
            batches = [batch for batch in batches if len(batch) == size]
        # This stream differs from the one that determines the sample order.
        seed = stream_seed(self._seed, "batches", number)
        return [batches[i] for i in epoch_order(len(batches), seed=seed, epoch=epoch, shuffle=self._shuffle)]


def _numbered(values: NDArray[Any], bounds: Sequence[float] | None) -> NDArray[np.int64]:
    """Return the group of each sample as an integer, starting at 0."""
    if bounds is not None:
        edges = np.asarray(bounds, dtype=np.float64)
        if edges.ndim != 1 or not np.all(np.diff(edges) > 0):
            raise ConfigValueError(f"GroupedBatchSampler: bounds={list(bounds)!r} must be increasing.")
        if not np.issubdtype(values.dtype, np.number):
            raise ConfigValueError(
                f"GroupedBatchSampler: bounds require numeric groups, but the groups have dtype {values.dtype}."
            )
        values = np.searchsorted(edges, values, side="right")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
