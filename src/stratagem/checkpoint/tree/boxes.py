"""Boxes cut out of tensors: where a rank's part of a sharded tensor lies in the whole."""

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


@final
@dataclass(frozen=True, slots=True, order=True)
class TensorBox:
    """A box of a tensor: its first index and its size in every dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """Return the box that is all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the box of a whole tensor, as a view."""
        for dim, (start, length) in enumerate(zip(self.start, self.shape, strict=True)):
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def runs(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (first element, number of elements) of what lies in one piece in a row-major tensor of ``shape``.

        In the order in which the box itself is laid out.
        """
        if self.numel == 0:
            return
        # The dimensions behind the last one that is cut lie in one piece with it.
        cut = max((dim for dim, size in enumerate(shape) if self.shape[dim] != size), default=0)
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        length = math.prod(self.shape[cut:])
        corner = sum(start * stride for start, stride in zip(self.start, strides, strict=True))
        for index in itertools.product(*(range(size) for size in self.shape[:cut])):
            yield corner + sum(map(int.__mul__, index, strides)), length

    def overlaps(self, other: TensorBox) -> bool:
        """Tell whether the two share an element."""
        if not self.numel or not other.numel:
            return False
        return all(
            start < theirs + size and theirs < start + length
            for start, length, theirs, size in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )


def boxes_cover(boxes: Sequence[TensorBox], shape: Sequence[int]) -> bool:
    """Tell whether the boxes make up a tensor of ``shape``, each element once."""
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
    # Sorted by where they begin, only those with a common first index can meet.
    ordered = sorted(box for box in boxes if box.numel)
    for index, box in enumerate(ordered):
        end = box.start[0] + box.shape[0] if box.start else 1
        for other in itertools.islice(ordered, index + 1, None):
            if other.start and other.start[0] >= end:
                break
            if box.overlaps(other):
                return False
    return True


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[TensorBox]:
    """Yield the fewest boxes that make up the elements ``start`` to ``stop`` of a row-major tensor, in their order.

    They are at most two for each dimension, less one.
    """
    if start >= stop:
        return
    if not shape:
        yield TensorBox((), ())
        return
    # Of one step along the first dimension.
    size = math.prod(shape[1:])
    first, into = divmod(start, size)
    last, rest = divmod(stop, size)
    if into and first == last:
        yield from _below(first, boxes_of_range(shape[1:], into, rest))
        return
    if into:
        yield from _below(first, boxes_of_range(shape[1:], into, size))
        first += 1
    if first < last:
        yield TensorBox((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if rest:
        yield from _below(last, boxes_of_range(shape[1:], 0, rest))


def _below(index: int, inner: Iterator[TensorBox]) -> Iterator[TensorBox]:
    """Yield the boxes of one step along a dimension more."""
    return (TensorBox((index, *box.start), (1, *box.shape)) for box in inner)


def box_of(tensor: Tensor, name: str) -> TensorBox:
    """Return where what this rank holds of a tensor lies in the whole; of a plain tensor it holds all.

    ``name`` is what errors call the tensor.

    Raises:
        CheckpointError: if the tensor is a sum that its ranks have not made yet.
    """
    if not is_sharded(tensor):
        return TensorBox.whole(tensor.shape)
    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        raise CheckpointError(
            f"The checkpoint's {name} is a DTensor with the placements {spread.placements}: its ranks hold parts of a sum. "
            "Redistribute it to Replicate() or Shard() before it is saved."
        )
    box = local_box(tensor)
    return TensorBox(tuple(part.start for part in box), tuple(part.stop - part.start for part in box))
