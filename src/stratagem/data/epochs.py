"""Pass the epoch number to datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import ChainDataset, ConcatDataset, StackDataset, Subset

__all__ = ["follows_epoch", "set_epoch_of", "shares_epoch"]


def set_epoch_of(dataset: Any, epoch: int) -> None:
    """Call ``set_epoch(epoch)`` on a dataset, or on the datasets that torch's containers combine, if they have that method."""
    for part in _with_set_epoch(dataset):
        part.set_epoch(epoch)


def follows_epoch(dataset: Any) -> bool:
    """Return whether a dataset, or one that it combines, has ``set_epoch``."""
    return any(True for _ in _with_set_epoch(dataset))


def shares_epoch(dataset: Any) -> bool:
    """Return whether the datasets with ``set_epoch`` keep the epoch in shared memory, as Hugging Face datasets do."""
    return all(
        any(isinstance(value, Tensor) and value.is_shared() for value in getattr(part, "__dict__", {}).values())
        for part in _with_set_epoch(dataset)
    )


def _with_set_epoch(dataset: Any) -> Iterator[Any]:
    if callable(getattr(dataset, "set_epoch", None)):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from _with_set_epoch(dataset.dataset)
    elif isinstance(dataset, ConcatDataset | ChainDataset | StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from _with_set_epoch(part)
