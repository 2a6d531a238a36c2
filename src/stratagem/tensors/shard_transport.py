"""Send the shards of tensors to the ranks that compute with whole tensors, and return the results as shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, cast, final

import torch
import torch.distributed as torch_dist
from torch import Tensor

from stratagem.distributed import all_gather_object, get_rank, get_world_size
from stratagem.tensors.dtensor import has_all_values, local_box

__all__ = ["ShardLayout", "ShardTransport", "assign_owners", "shard_group"]

# The pieces of all tensors are sent in one buffer of bytes; each begins at a multiple of this number, as dtypes require.
_ALIGNMENT: Final = 16

# The first index of a box and the index after its last one, for each dimension.
Box = tuple[tuple[int, int], ...]


@final
@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How a tensor is divided among the ranks of a group.

    Attributes:
        shape: the shape of the whole tensor.
        boxes: the part that each rank stores.
        sends: whether each rank sends its part; of several ranks that store the same part, only the first one does.
        is_stacked: whether the parts, padded to equal size, contain the values of the whole tensor in their order.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    sends: tuple[bool, ...]
    is_stacked: bool

    @classmethod
    def of(cls, shape: Sequence[int], boxes: Sequence[Box]) -> ShardLayout:
        """Return the layout of a tensor whose parts are given by rank."""
        sends = tuple(_numel(box) > 0 and box not in boxes[:rank] for rank, box in enumerate(boxes))
        sizes = [_numel(box) if sent else 0 for box, sent in zip(boxes, sends, strict=True)]
        ends = [box[0] for box, sent in zip(boxes, sends, strict=True) if sent]
        is_stacked = (
            all(size == sizes[0] for size in sizes[: len(ends) - 1])
            and not any(sizes[len(ends) :])
            and sizes[len(ends) - 1] <= sizes[0]
            and all(first[1] == second[0] for first, second in pairwise(ends))
            and all(
                box[1:] == tuple((0, size) for size in shape[1:])
                for box, sent in zip(boxes, sends, strict=True)
                if sent
            )
        )
        return cls(tuple(shape), tuple(boxes), sends, is_stacked)

    def numel(self, rank: int) -> int:
        """Return the number of elements that a rank stores."""
        return _numel(self.boxes[rank])

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """Return the part of a whole tensor that a rank stores, as a view."""
        return whole[tuple(slice(start, stop) for start, stop in self.boxes[rank])]


@final
class ShardTransport:
    """Sends tensors that are sharded across the ranks of a group. All methods with tensors as arguments are collective.

    Args:
        group: the ranks; None for all ranks.
        device: the device whose tensors the group can send.
    """

    def __init__(self, group: torch_dist.ProcessGroup | None, device: torch.device) -> None:
        self.rank: Final = get_rank(group)
        self.size: Final = get_world_size(group)
        self.device: Final = device
        self._group = group

    def layouts(self, tensors: Sequence[Tensor]) -> list[ShardLayout]:
        """Return the layouts of ``DTensor`` objects, the same ones in the same order on each rank."""
        own = [tuple((part.start, part.stop) for part in local_box(tensor)) for tensor in tensors]
        boxes = all_gather_object(own, self._group)
        return [ShardLayout.of(tensor.shape, [each[index] for each in boxes]) for index, tensor in enumerate(tensors)]

    def gather(self, layouts: Sequence[ShardLayout], shards: Sequence[Tensor]) -> list[Tensor]:
        """Return the whole tensors on every rank, in one all-gather. They do not share memory with the shards."""
        lengths = [
            max(layout.numel(rank) for rank in range(self.size)) * shard.element_size()
            for layout, shard in zip(layouts, shards, strict=True)
        ]
        offsets, total = _offsets(lengths)
        sent = torch.empty(total, dtype=torch.uint8, device=self.device)
        for offset, shard in zip(offsets, shards, strict=True):
            _write(sent, offset, shard)
        received = torch.empty(self.size * total, dtype=torch.uint8, device=self.device)
        torch_dist.all_gather_single(received, sent, self._group)
        rows = received.view(self.size, total)
        return [
            self._assemble(layout, shard.dtype, rows[:, offset : offset + length])
            for layout, shard, offset, length in zip(layouts, shards, offsets, lengths, strict=True)
        ]

    def _assemble(self, layout: ShardLayout, dtype: torch.dtype, rows: Tensor) -> Tensor:
        """Return a whole tensor, given the bytes that each rank has sent."""
        if layout.is_stacked:
            numel = torch.Size(layout.shape).numel()
            return rows.reshape(-1).view(dtype)[:numel].view(layout.shape)
        whole = torch.empty(layout.shape, dtype=dtype, device=self.device)
        for rank, sends in enumerate(layout.sends):
            if sends:
                part = layout.part(whole, rank)
                part.copy_(rows[rank, : part.numel() * part.element_size()].view(dtype).view(part.shape))
        return whole

    def to_owners(
        self, layouts: Sequence[ShardLayout], shards: Sequence[Tensor], owners: Sequence[int]
    ) -> list[Tensor | None]:
        """Return the whole tensors that this rank owns, and None for others, in one all-to-all."""
        sizes = [shard.element_size() for shard in shards]
        plan = [
            [index for index, owner in enumerate(owners) if owner == rank and layouts[index].sends[self.rank]]
            for rank in range(self.size)
        ]
        mine = [
            [index for index, owner in enumerate(owners) if owner == self.rank and layouts[index].sends[rank]]
            for rank in range(self.size)
        ]
        received = self._all_to_all(
            [[shards[index] for index in indices] for indices in plan],
            [[layouts[index].numel(rank) * sizes[index] for index in mine[rank]] for rank in range(self.size)],
        )
        wholes: list[Tensor | None] = [
            torch.empty(layout.shape, dtype=shard.dtype, device=self.device) if owner == self.rank else None
            for layout, shard, owner in zip(layouts, shards, owners, strict=True)
        ]
        for rank, parts in enumerate(received):
            for index, part in zip(mine[rank], parts, strict=True):
                whole = cast("Tensor", wholes[index])
                target = layouts[index].part(whole, rank)
                target.copy_(part.view(whole.dtype).view(target.shape))
        return wholes

    def from_owners(
        self,
        layouts: Sequence[ShardLayout],
        wholes: Sequence[Tensor | None],
        owners: Sequence[int],
        dtypes: Sequence[torch.dtype],
    ) -> list[Tensor]:
        """Return this rank's shards of tensors that are whole on their owners, in one all-to-all."""
        sent = [
            [
                layouts[index].part(whole, rank)
                for index, whole in enumerate(wholes)
                if whole is not None and layouts[index].numel(rank)
            ]
            for rank in range(self.size)
        ]
        plan = [
            [index for index, owner in enumerate(owners) if owner == rank and layouts[index].numel(self.rank)]
            for rank in range(self.size)
        ]
        received = self._all_to_all(
            sent, [[layouts[i].numel(self.rank) * dtypes[i].itemsize for i in indices] for indices in plan]
        )
        shards: dict[int, Tensor] = {}
        for indices, parts in zip(plan, received, strict=True):
            for index, part in zip(indices, parts, strict=True):
                lengths = [stop - start for start, stop in layouts[index].boxes[self.rank]]
                shards[index] = part.view(dtypes[index]).view(lengths)
        return [
            shards[index]
            if index in shards
            else torch.empty([stop - start for start, stop in layout.boxes[self.rank]], dtype=dtype, device=self.device)
            for index, (layout, dtype) in enumerate(zip(layouts, dtypes, strict=True))
        ]

    def _all_to_all(self, sent: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Send a list of tensors to each rank; return the bytes received from each, given their lengths."""
        sent_sizes = [sum(_padded(part.numel() * part.element_size()) for part in parts) for parts in sent]
        received_sizes = [sum(map(_padded, each)) for each in lengths]
        buffer = torch.empty(sum(sent_sizes), dtype=torch.uint8, device=self.device)
        offset = 0
        for part in (part for parts in sent for part in parts):
            _write(buffer, offset, part)
            offset += _padded(part.numel() * part.element_size())
        received = torch.empty(sum(received_sizes), dtype=torch.uint8, device=self.device)
        torch_dist.all_to_all_single(received, buffer, received_sizes, sent_sizes, self._group)
        offset, found = 0, []
        for each in lengths:
            parts = []
            for length in each:
                parts.append(received[offset : offset + length])
                offset += _padded(length)
            found.append(parts)
        return found


def shard_group(tensor: Tensor) -> tuple[torch_dist.ProcessGroup | None, torch.device] | None:
    """Return the group of ranks that a ``DTensor`` is sharded across, and its device; None if this rank has all values.

    If the tensor is sharded in several dimensions of its mesh, the group consists of all ranks, each of which stores a part.
    """
    dtensor: Any = tensor
    if has_all_values(tensor):
        return None
    mesh = dtensor.device_mesh
    sharded = [
        dim for dim, placement in enumerate(dtensor.placements) if not placement.is_replicate() and mesh.size(dim) > 1
    ]
    if not sharded:
        return None
    device = torch.empty(0, device=mesh.device_type).device
    return (mesh.get_group(sharded[0]) if len(sharded) == 1 else None), device


def assign_owners(costs: Sequence[float], ranks: int, before: Sequence[float] | None = None) -> list[int]:
    """Return an owner for each item, so that the ranks have about equal costs: the largest first, each to the least loaded.

    Args:
        costs: the costs of the items.
        ranks: the number of ranks.
        before: the costs that the ranks already have; 0 by default.
    """
    loads = [0.0] * ranks if before is None else [*before]
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def _numel(box: Box) -> int:
    return torch.Size([stop - start for start, stop in box]).numel()


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _offsets(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Return the position of each piece in a buffer, and the length of the buffer."""
    offsets, total = [], 0
    for length in lengths:
        offsets.append(total)
        total += _padded(length)
    return offsets, total


def _write(buffer: Tensor, offset: int, values: Tensor) -> None:
    """Copy the bytes of a tensor, which may be on another device or not contiguous, into a buffer."""
    target = buffer[offset : offset + values.numel() * values.element_size()]
    target.view(values.dtype).view(values.shape).copy_(values)
