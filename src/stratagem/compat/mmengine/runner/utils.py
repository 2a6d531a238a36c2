"""Seeds, validation intervals and batch sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from stratagem.compat.mmengine.dist import get_rank, sync_random_seed
from stratagem.compat.mmengine.logging import print_log
from stratagem.errors import ConfigValueError
from stratagem.utils import set_random_seed as seed_generators

__all__ = ["calc_dynamic_intervals", "set_random_seed"]


def calc_dynamic_intervals(
    start_interval: int, dynamic_interval_list: Sequence[tuple[int, int]] | None = None
) -> tuple[list[int], list[int]]:
    """Return the positions at which the validation interval changes, and the intervals from these positions on.

    Args:
        start_interval: the interval at the beginning.
        dynamic_interval_list: pairs (position, interval).

    Raises:
        AssertionError: if an item is not a tuple.
    """
    changes = list(dynamic_interval_list or ())
    if not all(isinstance(change, tuple) for change in changes):
        raise AssertionError(f"dynamic_intervals must be a list of tuples (position, interval), got {changes!r}.")
    return [0, *(position for position, _ in changes)], [start_interval, *(interval for _, interval in changes)]


def set_random_seed(seed: int | None = None, deterministic: bool = False, diff_rank_seed: bool = False) -> int:
    """Seed the generators of Python, NumPy and torch; return the seed of this rank. Collective if ``seed`` is None.

    Args:
        seed: the seed; by default, rank 0 draws one for all ranks.
        deterministic: whether torch uses only deterministic algorithms.
        diff_rank_seed: whether the rank is added to the seed.
    """
    seed = sync_random_seed() if seed is None else seed
    own = seed + get_rank() if diff_rank_seed else seed
    if deterministic and torch.backends.cudnn.benchmark:
        print_log(
            "deterministic=True: setting torch.backends.cudnn.benchmark to False, because it selects algorithms by their speed.",
            logger="current",
            level=logging.WARNING,
        )
    seed_generators(own, deterministic=deterministic)
    return own


def _get_batch_size(dataloader: Any) -> int:
    """Return the number of samples per batch of a loader or its configuration.

    Raises:
        ValueError: if it is unknown.
    """
    if isinstance(dataloader, DataLoader):
        size = getattr(dataloader.batch_sampler, "batch_size", None)
    elif isinstance(dataloader, Mapping):
        size = dataloader.get("batch_size") or (dataloader.get("batch_sampler") or {}).get("batch_size")
    else:
        raise ConfigValueError(f"dataloader must be a dict or a DataLoader, got {type(dataloader).__name__}.")
    if size is None:
        raise ConfigValueError("The batch size is unknown. Set batch_size in the dataloader or in its batch_sampler.")
    return int(size)
