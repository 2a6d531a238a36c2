"""Tensors that may be sharded over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stratagem.errors import CheckpointMismatchError
from stratagem.utils.imports import import_object
from stratagem.utils.torch_private import local_shape_and_offset

__all__ = [
    "stack_over_ranks",
    "copy_into",
    "is_plain",
    "is_sharded",
    "local_box",
    "to_local",
    "local_slice",
    "mesh_of",
    "shard_like",
    "full_tensor",
]


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is torch's own dense kind, without asking what else it may be."""
    return type(tensor) in (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a ``DTensor``: one that stands for a whole of which each rank has a part."""
    return not is_plain(tensor) and isinstance(tensor, _dtensor())


def mesh_of(tensor: Tensor) -> object | None:
    """Return the mesh of ranks over which a tensor is sharded; None for one that is not."""
    mesh: object | None = getattr(tensor, "device_mesh", None)
    return mesh


@torch.no_grad()
def to_local(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor that this rank has: of a sharded one its shard, else the tensor itself."""
    return _dtensor().to_local(tensor) if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in one piece on every rank, another as it is. Collective for a sharded one."""
    return _dtensor().full_tensor(tensor) if is_sharded(tensor) else tensor


def local_box(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole this rank has, a slice for each dimension; empty slices where it has none."""
    if not is_sharded(tensor):
        return tuple(slice(0, length) for length in tensor.shape)
    spread: Any = tensor
    if spread.device_mesh.get_coordinate() is None:
        return (slice(0, 0),) * tensor.ndim
    shape, offset = local_shape_and_offset(tensor.shape, spread.device_mesh, spread.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def local_slice(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank has of ``like``: a view, so nothing else of ``full`` is read."""
    return full[local_box(like)] if is_sharded(like) else full


@torch.no_grad()
def shard_like(full: Tensor, like: Tensor, *, copy: bool = False) -> Tensor:
    """Return a whole tensor sharded as ``like`` is, of the same type as before; as it is where ``like`` is not sharded.

    Each rank reads its own part of ``full`` alone, and where ``like`` lies on the same device, only when it is used:
    unless ``copy`` asks for memory of its own, the shard is a view. Not collective.

    Raises:
        CheckpointMismatchError: if the shapes differ.
    """
    if not is_sharded(like) or is_sharded(full):
        return full
    if full.shape != like.shape:
        raise CheckpointMismatchError(
            f"A tensor of shape {list(full.shape)} cannot be sharded as one of shape {list(like.shape)} is."
        )
    spread: Any = like
    part = local_slice(full, like).to(to_local(like).device, copy=copy)
    placed: Tensor = _dtensor().from_local(
        part, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed


@torch.no_grad()
def stack_over_ranks(row: Tensor, size: int, device: torch.device) -> Tensor:
    """Return a tensor of ``size`` rows along a new first dimension, of which each of all ranks has the one that it gives.

    Collective; rows are of one shape and type on every rank, and are not copied.
    """
    rows = row.unsqueeze(0)
    if size == 1:
        return rows
    mesh = import_object("torch.distributed.device_mesh:init_device_mesh")(device.type, (size,))
    by_row = import_object("torch.distributed.tensor:Shard")(0)
    spread: Tensor = _dtensor().from_local(rows, mesh, [by_row], run_check=False)
    return spread


@torch.no_grad()
def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, which may be sharded, with the values of a whole one or of one that is sharded alike."""
    if is_sharded(tensor) and not is_sharded(values):
        to_local(tensor).copy_(local_slice(values, tensor))
    else:
        tensor.copy_(values)


def _dtensor() -> Any:
    # Loaded with the first tensor that is no plain one: importing it takes a while.
    return import_object("torch.distributed.tensor:DTensor")
