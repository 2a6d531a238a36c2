"""Streams whose workers persist across epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import IterableDataset, get_worker_info

from stratagem.data.epochs import set_epoch_of
from stratagem.data.streams import seed_stream

__all__ = ["EpochStream"]


@final
class EpochStream(IterableDataset[Any]):
    """An iterable dataset for workers that persist across epochs.

    A worker has a copy of the dataset from the time when it started. Before each iteration, it reads the epoch from shared
    memory, passes it to ``set_epoch`` of its copy, and seeds the global generators for the epoch.

    Args:
        dataset: the iterable dataset.
        seed: the seed of the random streams of the workers.
        rank: the rank of this process, a key of the random streams.
    """

    def __init__(self, dataset: IterableDataset[Any], seed: int, rank: int) -> None:
        self.dataset = dataset
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._keys = seed, rank
        self._has_started = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, in this process and in all workers."""
        self._epoch.fill_(epoch)
        set_epoch_of(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, info = int(self._epoch.item()), get_worker_info()
        set_epoch_of(self.dataset, epoch)
        if self._has_started and info is not None:
            # When a worker starts, its worker_init_fn seeds the generators in the same way.
            seed, rank = self._keys
            seed_stream(seed, epoch, rank, info.id)
        self._has_started = True
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # raises TypeError if it has no length
