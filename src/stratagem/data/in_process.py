"""Load batches in the main process without the iterator of torch's ``DataLoader``, which takes 10 to 30 us per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.utils.data import DataLoader, IterableDataset, default_collate

from stratagem.data.collate import default_collate_in_process
from stratagem.utils.torch_private import is_profiling

__all__ = ["batches_in_process", "can_load_in_process"]

# The name under which torch's iterator records the loading of a batch for the profiler.
_RECORD = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


def can_load_in_process(loader: DataLoader[Any]) -> bool:
    """Return whether :func:`batches_in_process` yields the batches of ``iter(loader)``.

    It does not for subclasses, data workers, iterable datasets and ``pin_memory``.
    """
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and not isinstance(loader.dataset, IterableDataset)
        and not loader.pin_memory
    )


def batches_in_process(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator over the batches of a loader, with the same state of the loader's generator as ``iter(loader)``."""
    # Torch draws the base seed of the workers even if there are none.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    return _load(loader)


def _load(loader: DataLoader[Any]) -> Iterator[Any]:
    dataset: Any = loader.dataset
    collate = default_collate_in_process if loader.collate_fn is default_collate else loader.collate_fn
    batched = loader.batch_sampler is not None
    for indices in loader.batch_sampler if loader.batch_sampler is not None else loader.sampler:
        if is_profiling():
            with record_function(_RECORD):
                batch = _load_batch(dataset, collate, indices, batched=batched)
        else:
            batch = _load_batch(dataset, collate, indices, batched=batched)
        yield batch


def _load_batch(dataset: Any, collate: Callable[[Any], Any], indices: Any, *, batched: bool) -> Any:
    if not batched:
        return collate(dataset[indices])
    # Like torch, ignore an attribute that is None.
    at_once = getattr(dataset, "__getitems__", None)
    return collate(at_once(indices) if at_once else [dataset[index] for index in indices])
