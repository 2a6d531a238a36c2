"""A tensor of which this rank has some boxes: how engines that cut tensors in their own ways give state to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, final

import torch
from torch import Tensor

from stratagem.checkpoint.tree.boxes import Region, boxes
from stratagem.distributed import Team
from stratagem.errors import CheckpointError, CheckpointMismatchError

__all__ = ["Pieces", "take_box", "take_range"]


@final
class Pieces:
    """What this rank has of a tensor, as a leaf in a tree of state.

    Every rank of the team that saves gives a ``Pieces`` of the same type and shape. Together theirs make up the tensor;
    where several have the same box, the first of them counts.

    Args:
        dtype: the type of the numbers.
        shape: of the whole tensor.
        contents: box -> its content, of that box's shape; memory of the engine, which is not copied.

    Raises:
        CheckpointError: if a content is not of the shape and type that is said.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], contents: Mapping[Region, Tensor]) -> None:
        self.dtype = dtype
        self.shape = torch.Size(shape)
        self.contents = {box: content.detach() for box, content in contents.items()}
        for box, content in self.contents.items():
            if tuple(content.shape) != box.shape or content.dtype != dtype:
                raise CheckpointError(
                    f"The box at {list(box.start)} of {list(box.shape)} in a tensor of {dtype} has the content of a "
                    f"{content.dtype} of {list(content.shape)}."
                )

    @classmethod
    def of_range(cls, values: Tensor, start: int, shape: Sequence[int]) -> Self:
        """Return the part that begins at element ``start`` of the row-major tensor, with these values one after the other."""
        flat = values.detach().reshape(-1)
        contents: dict[Region, Tensor] = {}
        done = 0
        for box in boxes(shape, start, start + flat.numel()):
            contents[box] = flat[done : done + box.numel].view(box.shape)
            done += box.numel
        return cls(values.dtype, shape, contents)

    @classmethod
    def nothing(cls, dtype: torch.dtype, shape: Sequence[int]) -> Self:
        """Return the part of a rank that has none."""
        return cls(dtype, shape, {})

    def full_tensor(self) -> Tensor:
        """Return the whole tensor on the CPU, on every rank of the run. Collective."""
        return self.put_together([each.contents for each in Team.of().gather(self.on_cpu())])

    def put_together(self, told: Sequence[Mapping[Region, Tensor]]) -> Tensor:
        """Return the whole tensor from what each rank has.

        Raises:
            CheckpointError: if something of it is missing.
        """
        full = torch.empty(self.shape, dtype=self.dtype)
        found: set[Region] = set()
        for contents in told:
            for box, content in contents.items():
                if box not in found:
                    box.of(full).copy_(content)
                    found.add(box)
        if sum(box.numel for box in found) != full.numel():
            raise CheckpointError(f"The ranks' parts do not make up a tensor of shape {list(self.shape)}.")
        return full

    def on_cpu(self) -> Pieces:
        """Return the same with contents on the CPU; those that are there already are not copied."""
        return Pieces(self.dtype, self.shape, {box: content.cpu() for box, content in self.contents.items()})

    def __repr__(self) -> str:
        has = [(list(box.start), list(box.shape)) for box in self.contents]
        return f"Pieces({self.dtype}, {list(self.shape)}, boxes (start, shape) {has})"


def take_box(value: Tensor | Pieces, box: Region) -> Tensor:
    """Return a box of a tensor, as a view of it; of :class:`Pieces`, a box that this rank has.

    Raises:
        CheckpointMismatchError: if this rank does not have it.
    """
    if isinstance(value, Tensor):
        return box.of(value.detach())
    if box not in value.contents:
        raise CheckpointMismatchError(
            f"{value!r} does not have the box at {list(box.start)} of {list(box.shape)} on this rank: it was cut in another "
            "way. Save it to a checkpoint, from which every rank reads what it needs."
        )
    return value.contents[box]


def take_range(value: Tensor | Pieces, start: int, stop: int) -> Tensor:
    """Return consecutive elements of a row-major tensor, flat; of a tensor that is laid out so, as a view.

    Nothing but this range is read of a tensor that is mapped from a file.

    Raises:
        CheckpointMismatchError: if this rank does not have them.
    """
    if isinstance(value, Tensor):
        return value.detach().reshape(-1)[start:stop]
    parts = [take_box(value, box).reshape(-1) for box in boxes(value.shape, start, stop)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=value.dtype)
