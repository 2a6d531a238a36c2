"""A tensor of which this rank has some boxes: how engines that cut tensors in their own ways give state to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor

from stratagem.checkpoint.tree.boxes import TensorBox, boxes_of_range
from stratagem.distributed import Team
from stratagem.errors import CheckpointError, CheckpointMismatchError

__all__ = ["ShardedTensorState", "take_box", "take_range"]


@final
class ShardedTensorState:
    """The boxes of a tensor that this rank holds, as a leaf in a state tree.

    Every rank of the team that saves passes a ``ShardedTensorState`` with the same dtype and shape. The boxes of all
    ranks together cover the tensor. If several ranks hold the same box, the lowest rank writes it.

    Args:
        dtype: The dtype of the tensor.
        shape: The shape of the global tensor.
        shards: box -> the values in it, a tensor of the box's shape. Not copied.

    Raises:
        CheckpointError: If the dtype or the shape of a shard does not match its box.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], shards: Mapping[TensorBox, Tensor]) -> None:
        self.dtype = dtype
        self.shape = torch.Size(shape)
        self.shards = {box: content.detach() for box, content in shards.items()}
        for box, content in self.shards.items():
            if tuple(content.shape) != box.shape or content.dtype != dtype:
                raise CheckpointError(
                    f"The box at {list(box.start)} of {list(box.shape)} in a tensor of {dtype} has the content of a "
                    f"{content.dtype} of {list(content.shape)}."
                )

    @classmethod
    def from_flat_range(cls, values: Tensor, start: int, shape: Sequence[int]) -> Self:
        """Return the part that begins at element ``start`` of the row-major tensor, with these values one after the other."""
        flat = values.detach().reshape(-1)
        shards: dict[TensorBox, Tensor] = {}
        done = 0
        for box in boxes_of_range(shape, start, start + flat.numel()):
            shards[box] = flat[done : done + box.numel].view(box.shape)
            done += box.numel
        return cls(values.dtype, shape, shards)

    @classmethod
    def empty(cls, dtype: torch.dtype, shape: Sequence[int]) -> Self:
        """Return the part of a rank that has none."""
        return cls(dtype, shape, {})

    def full_tensor(self) -> Tensor:
        """Return the whole tensor on the CPU, on every rank of the run. Collective."""
        return self.assemble([each.shards for each in Team.of().gather(self.on_cpu())])

    def assemble(self, told: Sequence[Mapping[TensorBox, Tensor]]) -> Tensor:
        """Return the whole tensor from what each rank has.

        Raises:
            CheckpointError: if something of it is missing.
        """
        full = torch.empty(self.shape, dtype=self.dtype)
        found: set[TensorBox] = set()
        for shards in told:
            for box, content in shards.items():
                if box not in found:
                    box.of(full).copy_(content)
                    found.add(box)
        if sum(box.numel for box in found) != full.numel():
            raise CheckpointError(f"The ranks' parts do not make up a tensor of shape {list(self.shape)}.")
        return full

    def on_cpu(self) -> ShardedTensorState:
        """Return the same with shards on the CPU; those that are there already are not copied."""
        return ShardedTensorState(self.dtype, self.shape, {box: content.cpu() for box, content in self.shards.items()})

    def __repr__(self) -> str:
        has = [(list(box.start), list(box.shape)) for box in self.shards]
        return f"ShardedTensorState({self.dtype}, {list(self.shape)}, boxes (start, shape) {has})"


def take_box(value: Tensor | ShardedTensorState, box: TensorBox) -> Tensor:
    """Return a box of a tensor, as a view of it; of :class:`ShardedTensorState`, a box that this rank has.

    Raises:
        CheckpointMismatchError: if this rank does not have it.
    """
    if isinstance(value, Tensor):
        return box.of(value.detach())
    if box not in value.shards:
        raise CheckpointMismatchError(
            f"{value!r} does not have the box at {list(box.start)} of {list(box.shape)} on this rank: it was cut in another "
            "way. Save it to a checkpoint, from which every rank reads what it needs."
        )
    return value.shards[box]


def take_range(value: Tensor | ShardedTensorState, start: int, stop: int) -> Tensor:
    """Return consecutive elements of a row-major tensor, flat; of a tensor that is laid out so, as a view.

    Nothing but this range is read of a tensor that is mapped from a file.

    Raises:
        CheckpointMismatchError: if this rank does not have them.
    """
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[start:stop]
    parts = [take_box(value, box).reshape(-1) for box in boxes_of_range(value.shape, start, stop)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=value.dtype)
