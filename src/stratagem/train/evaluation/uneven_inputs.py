"""Run the same number of forward passes on every rank, for models whose forward pass is collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from stratagem.data import EpochLoader
from stratagem.distributed import all_gather_object, all_reduce, broadcast_object
from stratagem.train.run.context import Run

__all__ = ["pad_forward_passes"]

_END = object()


def pad_forward_passes(run: Run, loader: EpochLoader, step: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield the evaluation batches of this rank. Run a forward pass on each before requesting the next.

    If the forward pass is collective, a rank that runs out of batches continues to run forward passes on an earlier batch
    until all ranks have finished, and discards the results. In that case, this function is collective as well.

    Args:
        run: the run; its strategy defines whether a forward pass is collective.
        loader: the evaluation data.
        step: runs a forward pass on a batch.
    """
    batches = loader.batches(0)
    if not run.strategy.collective_forward:
        yield from batches
    elif loader.share is not None:
        # Every rank reads all batches, so it knows at the end whether the other ranks had another batch.
        yield from batches
        if loader.leftover is not None:
            step(loader.leftover)
    elif loader.length is None:
        yield from _asking_each_time(batches, step)
    else:
        yield from _counted(batches, loader, step)


def _counted(batches: Iterator[Any], loader: EpochLoader, step: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield the batches of a loader of known length, then pad to the number of batches of the longest loader."""
    max_num_batches = torch.tensor(loader.length)
    all_reduce(max_num_batches, "max")
    num_batches = 0
    last: Any = None
    for batch in batches:
        num_batches, last = num_batches + 1, batch
        yield batch
    missing = int(max_num_batches.item()) - num_batches
    if missing > 0 and num_batches == 0:
        collate = loader.collate
        last = loader.dataset[0] if collate is None else collate([loader.dataset[0]])
    for _ in range(missing):
        step(last)


def _asking_each_time(batches: Iterator[Any], step: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield the batches of a loader of unknown length, then run padding passes until all ranks have run out of batches."""
    last: Any = _END
    while True:
        batch = next(batches, _END)
        ranks = all_gather_object((batch is not _END, last is not _END))
        having = [rank for rank, (has_batch, _) in enumerate(ranks) if has_batch]
        if not having:
            return
        if not all(map(any, ranks)):
            # Some ranks have had no batch: send them a batch from another rank.
            borrowed = broadcast_object(batch if batch is not _END else None, having[0])
            last = borrowed if last is _END else last
        if batch is _END:
            step(last)
        else:
            last = batch
            yield batch
