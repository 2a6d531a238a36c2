"""Run the same number of forward passes on every rank, for models whose forward pass is collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from stratagem.data import EpochLoader
from stratagem.distributed import all_gather_object, all_reduce, broadcast_object
from stratagem.train.run.context import Run
from stratagem.train.run.device_batches import with_device_batches

__all__ = ["pad_collective_passes", "pad_forward_passes"]

_END = object()


# A batch as the loader yielded it, and the same batch for the model, which may be on the device already.
_Batch = tuple[Any, Any]


def pad_forward_passes(run: Run, loader: EpochLoader, step: Callable[[Any], Any]) -> Iterator[_Batch]:
    """Yield the evaluation batches of this rank. Run a forward pass on each before requesting the next.

    Each is a pair: the batch as the loader yielded it, and the batch for the model, which is on the device if the loader reads
    ahead.

    If the forward pass is collective, a rank that runs out of batches continues to run forward passes on an earlier batch
    until all ranks have finished, and discards the results. In that case, this function is collective as well.

    Args:
        run: the run; its strategy defines whether a forward pass is collective.
        loader: the evaluation data.
        step: runs a forward pass on a batch.
    """
    batches = with_device_batches(run, loader, loader.batches(0))
    if not run.strategy.collective_forward:
        yield from batches
    elif loader.share is not None:
        # Every rank reads all batches, so it knows at the end whether the other ranks had another batch.
        yield from batches
        if loader.leftover is not None:
            step(loader.leftover)
    else:
        yield from pad_collective_passes(batches, loader.length, step, first_sample=lambda: _first_sample(loader))


def _first_sample(loader: EpochLoader) -> Any:
    return loader.dataset[0] if loader.collate is None else loader.collate([loader.dataset[0]])


def pad_collective_passes(
    batches: Iterator[_Batch], length: int | None, step: Callable[[Any], Any], *, first_sample: Callable[[], Any]
) -> Iterator[_Batch]:
    """Yield batches, then run forward passes until all ranks have finished. Collective.

    Args:
        batches: the batches of this rank, as pairs; see :func:`pad_forward_passes`.
        length: the number of batches of this rank; None on all ranks if it is unknown.
        step: runs a forward pass on a batch.
        first_sample: returns a batch for a rank that has none, if the length is known.
    """
    if length is None:
        yield from _asking_each_time(batches, step)
        return
    max_num_batches = torch.tensor(length)
    all_reduce(max_num_batches, "max")
    num_batches = 0
    last: Any = None
    for batch in batches:
        num_batches, last = num_batches + 1, batch[1]
        yield batch
    missing = int(max_num_batches.item()) - num_batches
    if missing > 0 and num_batches == 0:
        last = first_sample()
    for _ in range(missing):
        step(last)


def _asking_each_time(batches: Iterator[_Batch], step: Callable[[Any], Any]) -> Iterator[_Batch]:
    """Yield the batches of a loader of unknown length, then run padding passes until all ranks have run out of batches."""
    last: Any = _END
    while True:
        batch = next(batches, None)
        ranks = all_gather_object((batch is not None, last is not _END))
        having = [rank for rank, (has_batch, _) in enumerate(ranks) if has_batch]
        if not having:
            return
        if not all(map(any, ranks)):
            # Some ranks have had no batch: send them a batch from another rank.
            borrowed = broadcast_object(None if batch is None else batch[0], having[0])
            last = borrowed if last is _END else last
        if batch is None:
            step(last)
        else:
            last = batch[1]
            yield batch
