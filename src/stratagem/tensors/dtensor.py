"""Helpers for tensors that may be ``DTensor`` shards."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from stratagem.errors import CheckpointMismatchError
from stratagem.utils.imports import import_object
from stratagem.utils.torch_private import local_shape_and_offset, local_tensor

__all__ = [
    "stack_over_ranks",
    "copy_into",
    "has_all_values",
    "is_plain",
    "is_sharded",
    "local_box",
    "to_local",
    "local_slice",
    "stored_shard",
    "mesh_of",
    "shard_as",
    "shard_like",
    "full_tensor",
    "with_local",
]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is exactly a ``Tensor`` or ``Parameter``; a fast check that excludes all subclasses."""
    return type(tensor) in (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``."""
    return not is_plain(tensor) and isinstance(tensor, _dtensor())


def has_all_values(tensor: Tensor) -> bool:
    """Return whether this rank has all values of a tensor: it is not a ``DTensor``, or it is replicated on the whole mesh."""
    return not is_sharded(tensor) or all(each.is_replicate() for each in cast("Any", tensor).placements)


def mesh_of(tensor: Tensor) -> object | None:
    """Return the device mesh of a ``DTensor``; None for other tensors."""
    mesh: object | None = getattr(tensor, "device_mesh", None)
    return mesh


def stored_shard(tensor: Tensor) -> Tensor:
    """Return the local tensor of a ``DTensor``, the same object in each call, or any other tensor itself.

    Unlike :func:`to_local`, this does not wait for values that a collective still computes; they are of another class than
    ``Tensor``.
    """
    return local_tensor(tensor) if is_sharded(tensor) else tensor


@torch.no_grad()
def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a ``DTensor``, or any other tensor itself."""
    return _dtensor().to_local(tensor) if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a ``DTensor`` on every rank, or any other tensor itself. Collective for a ``DTensor``."""
    return _dtensor().full_tensor(tensor) if is_sharded(tensor) else tensor


def local_box(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slices of the full tensor that this rank holds, one per dimension; empty slices if it holds nothing."""
    if not is_sharded(tensor):
        return tuple(slice(0, length) for length in tensor.shape)
    dtensor: Any = tensor
    if dtensor.device_mesh.get_coordinate() is None:
        return (slice(0, 0),) * tensor.ndim
    shape, offset = local_shape_and_offset(tensor.shape, dtensor.device_mesh, dtensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def local_slice(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of ``full`` that corresponds to this rank's shard of ``like``, as a view; the other parts are not read."""
    return full[local_box(like)] if is_sharded(like) else full


@torch.no_grad()
def shard_like(full: Tensor, like: Tensor, *, copy: bool = False) -> Tensor:
    """Return a full tensor sharded like ``like``, keeping its own dtype; unchanged if ``like`` is not a ``DTensor``.

    Each rank reads only its own part of ``full``. If ``like`` is on the same device, the shard is a view of ``full`` unless
    ``copy`` is True. Not collective.

    Raises:
        CheckpointMismatchError: if the shapes differ.
    """
    if not is_sharded(like) or is_sharded(full):
        return full
    if full.shape != like.shape:
        raise CheckpointMismatchError(
            f"A tensor of shape {list(full.shape)} cannot be sharded like a tensor of shape {list(like.shape)}."
        )
    return with_local(like, local_slice(full, like).to(to_local(like).device, copy=copy))


@torch.no_grad()
def with_local(like: Tensor, local: Tensor) -> Tensor:
    """Return a ``DTensor`` like ``like`` with another local shard; the shard itself if ``like`` is not a ``DTensor``."""
    if not is_sharded(like):
        return local
    dtensor: Any = like
    sharded: Tensor = _dtensor().from_local(
        local, dtensor.device_mesh, dtensor.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded


@torch.no_grad()
def shard_as(full: Tensor, mesh: Any, placements: Any) -> Tensor:
    """Return a copy of ``full``, which must be equal on all ranks, as a ``DTensor`` with these placements. Not collective."""
    shape, offset = local_shape_and_offset(full.shape, mesh, placements)
    part = full[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))].clone()
    sharded: Tensor = _dtensor().from_local(
        part, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    return sharded


@torch.no_grad()
def stack_over_ranks(row: Tensor, size: int, device: torch.device) -> Tensor:
    """Return a ``DTensor`` with a new first dimension of length ``size``, sharded so that each rank holds its ``row``.

    Collective; the rows must have the same shape and dtype on every rank, and are not copied.
    """
    rows = row.unsqueeze(0)
    if size == 1:
        return rows
    mesh = import_object("torch.distributed.device_mesh:init_device_mesh")(device.type, (size,))
    shard_rows = import_object("torch.distributed.tensor:Shard")(0)
    stacked: Tensor = _dtensor().from_local(rows, mesh, [shard_rows], run_check=False)
    return stacked


@torch.no_grad()
def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, possibly a ``DTensor``, with a full tensor or an equally sharded one."""
    if is_sharded(tensor) and not is_sharded(values):
        to_local(tensor).copy_(local_slice(values, tensor))
    else:
        tensor.copy_(values)


def _dtensor() -> Any:
    # Imported only for tensor subclasses, because the import is slow.
    return import_object("torch.distributed.tensor:DTensor")
