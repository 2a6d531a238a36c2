"""Represent a tensor whose boxes are distributed across ranks, for engines that shard tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor

from stratagem.checkpoint.tree.boxes import TensorBox, boxes_of_range
from stratagem.distributed import RankGroup
from stratagem.errors import CheckpointError, CheckpointMismatchError

__all__ = ["ShardedTensorState", "take_box", "take_range"]


@final
class ShardedTensorState:
    """The boxes of a tensor that this rank holds, used as a leaf of a state tree.

    Each rank that takes part in a save passes a ``ShardedTensorState`` with the same dtype and shape. The boxes of all
    ranks together cover the tensor. If several ranks hold the same box, the lowest rank writes it.

    Args:
        dtype: the dtype of the tensor.
        shape: the shape of the global tensor.
        shards: a mapping from boxes to tensors with the values in the box, which are not copied.

    Raises:
        CheckpointError: if the dtype or the shape of a shard does not match its box.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], shards: Mapping[TensorBox, Tensor]) -> None:
        self.dtype = dtype
        self.shape = torch.Size(shape)
        self.shards = {box: shard.detach() for box, shard in shards.items()}
        for box, shard in self.shards.items():
            if tuple(shard.shape) != box.shape or shard.dtype != dtype:
                raise CheckpointError(
                    f"The shard for the box at {list(box.start)} with dtype {dtype} and shape {list(box.shape)} has "
                    f"dtype {shard.dtype} and shape {list(shard.shape)}."
                )

    @classmethod
    def from_flat_range(cls, values: Tensor, start: int, shape: Sequence[int]) -> Self:
        """Return the state of a rank that holds ``values``: consecutive elements of a row-major tensor from ``start``."""
        flat = values.detach().reshape(-1)
        shards: dict[TensorBox, Tensor] = {}
        done = 0
        for box in boxes_of_range(shape, start, start + flat.numel()):
            shards[box] = flat[done : done + box.numel].view(box.shape)
            done += box.numel
        return cls(values.dtype, shape, shards)

    @classmethod
    def empty(cls, dtype: torch.dtype, shape: Sequence[int]) -> Self:
        """Return the state of a rank that holds no part of the tensor."""
        return cls(dtype, shape, {})

    def full_tensor(self) -> Tensor:
        """Return the global tensor on the CPU, on every rank of the run. Collective."""
        return self.assemble([each.shards for each in RankGroup.of().gather(self.to_cpu())])

    def assemble(self, shards_of_ranks: Sequence[Mapping[TensorBox, Tensor]]) -> Tensor:
        """Return the global tensor, given the shards of each rank.

        Raises:
            CheckpointError: if the shards do not cover the tensor.
        """
        full = torch.empty(self.shape, dtype=self.dtype)
        found: set[TensorBox] = set()
        for shards in shards_of_ranks:
            for box, shard in shards.items():
                if box not in found:
                    box.of(full).copy_(shard)
                    found.add(box)
        if sum(box.numel for box in found) != full.numel():
            raise CheckpointError(f"The shards of all ranks do not cover a tensor of shape {list(self.shape)}.")
        return full

    def to_cpu(self) -> ShardedTensorState:
        """Return the same state with its shards on the CPU; shards that are already there are not copied."""
        return ShardedTensorState(self.dtype, self.shape, {box: shard.cpu() for box, shard in self.shards.items()})

    def __repr__(self) -> str:
        boxes = [(list(box.start), list(box.shape)) for box in self.shards]
        return f"ShardedTensorState({self.dtype}, {list(self.shape)}, boxes (start, shape) {boxes})"


def take_box(value: Tensor | ShardedTensorState, box: TensorBox) -> Tensor:
    """Return a box of a tensor as a view; for a :class:`ShardedTensorState`, a box that this rank holds.

    Raises:
        CheckpointMismatchError: if this rank does not hold the box.
    """
    if isinstance(value, Tensor):
        return box.of(value.detach())
    if box not in value.shards:
        raise CheckpointMismatchError(
            f"{value!r} does not have the box at {list(box.start)} with shape {list(box.shape)} on this rank, because the "
            "tensor is sharded differently. Save it to a checkpoint first: every rank can read any box of a checkpoint."
        )
    return value.shards[box]


def take_range(value: Tensor | ShardedTensorState, start: int, stop: int) -> Tensor:
    """Return the elements ``start`` to ``stop`` of a row-major tensor as a flat tensor; a view if it is contiguous.

    Only this range of a memory-mapped tensor is read.

    Raises:
        CheckpointMismatchError: if this rank does not hold the range.
    """
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[start:stop]
    parts = [take_box(value, box).reshape(-1) for box in boxes_of_range(value.shape, start, stop)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=value.dtype)
