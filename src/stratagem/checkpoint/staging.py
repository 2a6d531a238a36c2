"""Memory in which state waits to be written, while what it was copied from goes on changing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from stratagem.distributed import Team

__all__ = ["StagedState", "Staging"]

# In bytes: wide enough for every type of numbers, and for the widest instructions that copy.
_ALIGNMENT = 64


@final
@dataclass(frozen=True, slots=True)
class StagedState:
    """A tree of state, taken apart: all that is no tensor is a copy already.

    Attributes:
        tensors: what this rank writes; the tree's own memory.
        publish: writes these tensors, or copies of them in the same order, under a path. Collective over the team.
    """

    tensors: Sequence[Tensor]
    write: Callable[[Sequence[Tensor], Path, Team], None]


@final
class Staging:
    """Memory on the CPU that tensors are copied into: allocated once, and used again each time.

    Where tensors come from an accelerator, its pages are pinned, so that the device writes into them by itself.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._shapes: list[tuple[torch.dtype, torch.Size]] = []
        self._copies: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """How much memory it has."""
        return self._memory.numel()

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors here; return the copies, each a storage of its own, which last until the next call."""
        away = any(tensor.device.type != "cpu" for tensor in tensors)
        shapes = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if shapes != self._shapes or (away and not self._memory.is_pinned()):
            self._lay_out(shapes, pinned=away)
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=away)
        if away:
            torch.accelerator.current_stream().synchronize()
        return self._copies

    def _lay_out(self, shapes: list[tuple[torch.dtype, torch.Size]], *, pinned: bool) -> None:
        sizes = [shape.numel() * dtype.itemsize for dtype, shape in shapes]
        places = list(itertools.accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0))
        # First the old goes, or there would be both for a moment.
        self._copies = []
        if places[-1] > self.nbytes or (pinned and not self._memory.is_pinned()):
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pinned)
        memory = self._memory.numpy()
        self._copies = [
            # By way of NumPy, whose slices are storages of their own: torch.save would write the whole memory for a view.
            torch.from_numpy(memory[place : place + size]).view(dtype).view(shape)
            for (dtype, shape), place, size in zip(shapes, places, sizes, strict=False)
        ]
        self._shapes = shapes
