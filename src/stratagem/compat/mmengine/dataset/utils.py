"""Functions for data loaders: combining samples to batches, and initializing workers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate as torch_default_collate

from stratagem.compat.mmengine.registry import FUNCTIONS
from stratagem.compat.mmengine.structures import BaseDataElement
from stratagem.errors import TrainingError

__all__ = ["COLLATE_FUNCTIONS", "default_collate", "pseudo_collate", "worker_init_fn"]

COLLATE_FUNCTIONS = FUNCTIONS
_WITHOUT_STRUCTURE = (torch.Tensor, int, float)


def worker_init_fn(
    worker_id: int, num_workers: int, rank: int, seed: int, disable_subprocess_warning: bool = False
) -> None:
    """Seed the random number generators of a worker of a data loader.

    Args:
        worker_id: the number of the worker.
        num_workers: the number of workers per rank.
        rank: the rank.
        seed: the seed of the run.
        disable_subprocess_warning: whether only the first worker shows warnings.
    """
    worker_seed = num_workers * rank + worker_id + seed
    np.random.seed(worker_seed)
    random.seed(worker_seed)
    torch.manual_seed(worker_seed)
    if disable_subprocess_warning and worker_id != 0:
        warnings.simplefilter("ignore")


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def pseudo_collate(data_batch: Sequence[Any]) -> Any:
    """Combine samples to a batch with their structure, in which values are lists. Tensors are not stacked."""
    return _collate(data_batch, lambda values: values, (str, bytes))


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def default_collate(data_batch: Sequence[Any]) -> Any:
    """Combine samples to a batch with their structure, in which tensors and numbers are stacked."""
    return _collate(data_batch, torch_default_collate, (BaseDataElement, str, bytes))


def _collate(batch: Sequence[Any], combine: Callable[[Any], Any], whole: tuple[type, ...]) -> Any:
    """Combine samples recursively; ``combine`` combines values without structure, and ``whole`` are not combined."""
    first: Any = batch[0]
    if isinstance(first, whole):
        return batch
    if isinstance(first, _WITHOUT_STRUCTURE):
        return combine(batch)
    kind = type(first)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return kind(*(_collate(values, combine, whole) for values in zip(*batch, strict=True)))
    if isinstance(first, Mapping):
        return kind({key: _collate([each[key] for each in batch], combine, whole) for key in first})
    if isinstance(first, Sequence) and not isinstance(first, str | bytes):
        lengths = [len(each) for each in batch]
        if len(set(lengths)) > 1:
            raise TrainingError(f"The samples of a batch must have the same length, got {lengths}.")
        combined = [_collate(values, combine, whole) for values in zip(*batch, strict=True)]
        if isinstance(first, tuple):
            return combined
        try:
            return kind(combined)
        except TypeError:  # such as range
            return combined
    return combine(batch)
