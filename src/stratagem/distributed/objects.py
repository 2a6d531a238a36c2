"""Collectives on picklable objects. The ranks of a run trust each other, so objects are unpickled.

In a single process, they return immediately. Ranks are relative to the given group.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Any, TypeVar, cast

import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, _check_rank, get_rank, get_world_size

__all__ = ["all_gather_object", "broadcast_object", "broadcast_object_list", "collect_results", "gather_object"]

T = TypeVar("T")

_ABSENT = object()


def broadcast_object_list(data: list[Any], src: int = 0, group: Group | None = None) -> None:
    """Overwrite the items of ``data`` on every rank with rank ``src``'s items. Collective; lists must have equal lengths."""
    _check_rank(src, group)
    if get_world_size(group) > 1:
        torch_dist.broadcast_object_list(data, group=group, group_src=src)


def broadcast_object(data: T, src: int = 0, group: Group | None = None) -> T:
    """Return rank ``src``'s object on every rank. Collective."""
    box: list[T] = [data]
    broadcast_object_list(box, src, group)
    return box[0]


def all_gather_object(data: T, group: Group | None = None) -> list[T]:
    """Return the objects of all ranks, ordered by rank. Collective."""
    size = get_world_size(group)
    if size == 1:
        return [data]
    gathered: list[Any] = [None] * size
    torch_dist.all_gather_object(gathered, data, group)
    return gathered


def gather_object(data: T, dst: int = 0, group: Group | None = None) -> list[T] | None:
    """Return the objects of all ranks, ordered by rank, on rank ``dst``; None on the others. Collective."""
    _check_rank(dst, group)
    size = get_world_size(group)
    if size == 1:
        return [data]
    gathered: list[Any] | None = [None] * size if get_rank(group) == dst else None
    torch_dist.gather_object(data, gathered, group=group, group_dst=dst)
    return gathered


def collect_results(results: list[T], size: int, group: Group | None = None) -> list[T] | None:
    """On rank 0, return the results of all ranks in the order of the samples; on other ranks, return None.

    Collective. Samples are assumed to be distributed round-robin (rank 0 the first, rank 1 the second, ...), as the
    built-in samplers do. Results beyond ``size`` are removed, since samplers pad the data so that every rank has the
    same number of samples.
    """
    parts = gather_object(results, 0, group)
    if parts is None:
        return None
    merged = chain.from_iterable(zip_longest(*parts, fillvalue=_ABSENT))
    return [cast("T", result) for result in merged if result is not _ABSENT][:size]
