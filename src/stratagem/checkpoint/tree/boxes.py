"""Axis-aligned boxes of tensors: which elements of a global tensor a rank holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

from torch import Tensor

from stratagem.errors import CheckpointError
from stratagem.tensors.dtensor import is_sharded, local_box

__all__ = ["TensorBox", "boxes_of_range", "box_of", "boxes_cover"]

# Comparing corners takes 2**n steps per box if n dimensions are sharded, so limit n. Strategies shard fewer dimensions
# than this.
_MOST_CUT_DIMS = 8
_MOST_PAIRED = 2000


@final
@dataclass(frozen=True, slots=True, order=True)
class TensorBox:
    """A box of a tensor, given by its first index and its size in each dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """Return the box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the elements of a global tensor in this box, as a view."""
        for dim, (start, length) in enumerate(zip(self.start, self.shape, strict=True)):
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def runs(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (first element, number of elements) of each contiguous run of the box in a row-major tensor of ``shape``.

        The runs are in the row-major order of the box.
        """
        if self.numel == 0:
            return
        # The dimensions after the last partly covered dimension are contiguous with it.
        cut = max((dim for dim, size in enumerate(shape) if self.shape[dim] != size), default=0)
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        length = math.prod(self.shape[cut:])
        corner = sum(start * stride for start, stride in zip(self.start, strides, strict=True))
        for index in itertools.product(*(range(size) for size in self.shape[:cut])):
            yield corner + sum(map(int.__mul__, index, strides)), length

    def overlaps(self, other: TensorBox) -> bool:
        """Return whether the two boxes share an element."""
        if not self.numel or not other.numel:
            return False
        return all(
            start < theirs + size and theirs < start + length
            for start, length, theirs, size in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )


def boxes_cover(boxes: Sequence[TensorBox], shape: Sequence[int]) -> bool:
    """Return whether the boxes cover a tensor of ``shape``, each element exactly once."""
    inside = all(
        len(box.start) == len(shape)
        and all(
            start >= 0 and start + length <= size
            for start, length, size in zip(box.start, box.shape, shape, strict=True)
        )
        for box in boxes
    )
    if not inside or sum(box.numel for box in boxes) != math.prod(shape):
        return False
    cut = [dim for dim, size in enumerate(shape) if any(box.shape[dim] != size for box in boxes if box.numel)]
    if len(cut) > _MOST_CUT_DIMS:
        # No strategy shards a tensor along so many dimensions. Comparing all pairs is feasible only for a small number
        # of boxes.
        return len(boxes) <= _MOST_PAIRED and not _any_overlap([box for box in boxes if box.numel])
    return _corners(boxes, cut) == _corners([TensorBox.whole(shape)], cut)


def _corners(boxes: Sequence[TensorBox], dims: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Return the signed corners of all boxes, without corners whose signs cancel.

    The signs are the mixed differences of the function that counts how many boxes contain an element. They determine
    this function, so two sets of boxes with the same signed corners cover the same elements equally often. The time is
    linear in the number of boxes.
    """
    counts: dict[tuple[int, ...], int] = {}
    for box in boxes:
        if not box.numel:
            continue
        edges = [((box.start[dim], 1), (box.start[dim] + box.shape[dim], -1)) for dim in dims]
        for corner in itertools.product(*edges):
            place = tuple(position for position, _ in corner)
            counts[place] = counts.get(place, 0) + math.prod(sign for _, sign in corner)
    return {place: count for place, count in counts.items() if count}


def _any_overlap(boxes: Sequence[TensorBox]) -> bool:
    return any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[TensorBox]:
    """Yield the fewest boxes that cover the elements ``start`` to ``stop`` of a row-major tensor, in order.

    There are at most ``2 * len(shape) - 1`` boxes.
    """
    if start >= stop:
        return
    if not shape:
        yield TensorBox((), ())
        return
    # The number of elements per index of the first dimension.
    size = math.prod(shape[1:])
    first, offset = divmod(start, size)
    last, remainder = divmod(stop, size)
    if offset and first == last:
        yield from _add_dimension(first, boxes_of_range(shape[1:], offset, remainder))
        return
    if offset:
        yield from _add_dimension(first, boxes_of_range(shape[1:], offset, size))
        first += 1
    if first < last:
        yield TensorBox((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if remainder:
        yield from _add_dimension(last, boxes_of_range(shape[1:], 0, remainder))


def _add_dimension(index: int, inner: Iterator[TensorBox]) -> Iterator[TensorBox]:
    """Yield the boxes with one more leading dimension, at ``index``."""
    return (TensorBox((index, *box.start), (1, *box.shape)) for box in inner)


def box_of(tensor: Tensor, name: str) -> TensorBox:
    """Return the box of the global tensor that this rank holds; for an unsharded tensor, the whole tensor.

    ``name`` is used in error messages.

    Raises:
        CheckpointError: if the tensor is a DTensor with a partial placement.
    """
    if not is_sharded(tensor):
        return TensorBox.whole(tensor.shape)
    dtensor: Any = tensor
    if any(placement.is_partial() for placement in dtensor.placements):
        raise CheckpointError(
            f"The checkpoint's {name} is a DTensor with the placements {dtensor.placements}, which include a partial sum. "
            "Redistribute it to Replicate() or Shard() before saving."
        )
    box = local_box(tensor)
    return TensorBox(tuple(part.start for part in box), tuple(part.stop - part.start for part in box))
