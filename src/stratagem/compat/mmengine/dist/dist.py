"""Collectives on tensors and objects. Ranks of sources and destinations are global ranks, as in MMEngine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stratagem import distributed
from stratagem.compat.mmengine.checks import NotSupportedError, require
from stratagem.distributed import all_gather as all_gather
from stratagem.distributed import all_gather_object as all_gather_object
from stratagem.distributed import get_world_size

__all__ = [
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_reduce_dict",
    "all_reduce_params",
    "broadcast",
    "broadcast_object_list",
    "collect_results",
    "collect_results_cpu",
    "collect_results_gpu",
    "gather",
    "gather_object",
    "sync_random_seed",
]

_DEVICES = ("cpu", "gpu", "npu")
_MIB = 2**20


def all_reduce(data: Tensor, op: str = "sum", group: ProcessGroup | None = None) -> None:
    """Reduce ``data`` over all ranks in place. Collective.

    Args:
        data: a tensor of the same shape and dtype on all ranks.
        op: sum, mean, product, min, max, band, bor or bxor. The mean of integers is rounded towards zero.
        group: the process group; all ranks by default.

    Raises:
        ValueError: if the operation is unknown.
    """
    op = op.lower()
    if op == "mean" and not (data.is_floating_point() or data.is_complex()):
        distributed.all_reduce(data, "sum", group)
        data.copy_(data / get_world_size(group))
    else:
        distributed.all_reduce(data, op, group)


def gather(data: Tensor, dst: int = 0, group: ProcessGroup | None = None) -> list[Tensor]:
    """Return the tensors of all ranks on rank ``dst``, and an empty list on the others. Collective."""
    return distributed.gather(data, _rank_in(group, dst), group)


def broadcast(data: Tensor, src: int = 0, group: ProcessGroup | None = None) -> None:
    """Overwrite ``data`` on every rank with the values of rank ``src``. Collective."""
    distributed.broadcast(data, _rank_in(group, src), group)


def broadcast_object_list(data: list[Any], src: int = 0, group: ProcessGroup | None = None) -> None:
    """Overwrite the items of ``data`` on every rank with those of rank ``src``. Collective.

    Raises:
        AssertionError: if ``data`` is not a list.
    """
    require(isinstance(data, list), f"The objects must be in a list, got {type(data).__name__}.")
    distributed.broadcast_object_list(data, _rank_in(group, src), group)


def gather_object(data: Any, dst: int = 0, group: ProcessGroup | None = None) -> list[Any] | None:
    """Return the objects of all ranks on rank ``dst``, and None on the others. Collective."""
    return distributed.gather_object(data, _rank_in(group, dst), group)


def sync_random_seed(group: ProcessGroup | None = None) -> int:
    """Return a seed that rank 0 draws from NumPy's global generator, the same on every rank. Collective."""
    seed = int(np.random.randint(2**31))
    if get_world_size(group) > 1:
        shared = torch.tensor([seed], dtype=torch.int64)
        distributed.broadcast(shared, 0, group)
        seed = int(shared.item())
    return seed


def all_reduce_dict(data: dict[str, Tensor], op: str = "sum", group: ProcessGroup | None = None) -> None:
    """Replace the tensors in ``data`` by their reductions over all ranks, in one collective per dtype.

    Args:
        data: tensors with the same names, shapes and dtypes on all ranks.
        op: see :func:`all_reduce`.
        group: the process group; all ranks by default.

    Raises:
        AssertionError: if ``data`` is not a dict.
    """
    require(isinstance(data, dict), f"The tensors must be in a dict, got {type(data).__name__}.")
    if get_world_size(group) == 1:
        return
    by_dtype: dict[torch.dtype, list[str]] = defaultdict(list)
    for name in sorted(data):
        by_dtype[data[name].dtype].append(name)
    for names in by_dtype.values():
        reduced = [data[name].clone() for name in names]
        _all_reduce_flat(reduced, op, group)
        data.update(zip(names, reduced, strict=True))


def all_reduce_params(
    params: Iterable[Tensor],
    coalesce: bool = True,
    bucket_size_mb: int = -1,
    op: str = "sum",
    group: ProcessGroup | None = None,
) -> None:
    """Reduce tensors over all ranks in place. Collective.

    Args:
        params: the same tensors on all ranks.
        coalesce: whether to reduce several tensors in one collective.
        bucket_size_mb: the largest size of tensors that are reduced together, in MiB; all of a dtype if it is not positive.
        op: see :func:`all_reduce`.
        group: the process group; all ranks by default.
    """
    if get_world_size(group) == 1:
        return
    tensors = [param.detach() for param in params]
    limit = bucket_size_mb * _MIB if bucket_size_mb > 0 else None
    for bucket in _buckets(tensors, limit) if coalesce else ([tensor] for tensor in tensors):
        _all_reduce_flat(bucket, op, group)


def collect_results(results: list[Any], size: int, device: str = "cpu", tmpdir: str | None = None) -> list[Any] | None:
    """Return the results of all ranks in the order of the samples on rank 0, and None on the others. Collective.

    Results are sent through the process group, so ``tmpdir``, where MMEngine exchanges them as files, is not needed.

    Args:
        results: the results of this rank, for the samples rank, rank + world size, ...
        size: the number of samples; results of padding samples at the end are removed.
        device: ``"cpu"``, ``"gpu"`` or ``"npu"``; the same here.
        tmpdir: a folder for MMEngine's files, which no longer exist; must be None unless the device is ``"cpu"``.

    Raises:
        NotImplementedError: if the device is unknown.
        AssertionError: if ``tmpdir`` is given for another device than ``"cpu"``.
    """
    if device not in _DEVICES:
        raise NotSupportedError(f"device must be one of {', '.join(map(repr, _DEVICES))}, got {device!r}.")
    require(device == "cpu" or tmpdir is None, f"tmpdir must be None for device={device!r}.")
    return collect_results_cpu(results, size, tmpdir)


def collect_results_cpu(result_part: list[Any], size: int, tmpdir: str | None = None) -> list[Any] | None:  # noqa: ARG001
    """Return the results of all ranks on rank 0; see :func:`collect_results`."""
    return distributed.collect_results(result_part, size)


def collect_results_gpu(result_part: list[Any], size: int) -> list[Any] | None:
    """Return the results of all ranks on rank 0; see :func:`collect_results`."""
    return distributed.collect_results(result_part, size)


def _rank_in(group: ProcessGroup | None, rank: int) -> int:
    """Return the rank in a group of a global rank."""
    return rank if group is None else torch_dist.get_group_rank(group, rank)


def _buckets(tensors: list[Tensor], limit: int | None) -> Iterable[list[Tensor]]:
    """Return the tensors in lists of one dtype and device, each with at most ``limit`` bytes or a single tensor."""
    buckets: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = defaultdict(lambda: [[]])
    for tensor in tensors:
        of_kind = buckets[tensor.dtype, tensor.device]
        if limit is not None and of_kind[-1] and sum(map(_num_bytes, of_kind[-1])) + _num_bytes(tensor) > limit:
            of_kind.append([])
        of_kind[-1].append(tensor)
    return (bucket for of_kind in buckets.values() for bucket in of_kind)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_reduce_flat(tensors: list[Tensor], op: str, group: ProcessGroup | None) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    all_reduce(flat, op, group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
