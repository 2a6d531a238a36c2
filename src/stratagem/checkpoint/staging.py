"""Keep a copy of the state in CPU memory until it is written, while training modifies the original."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from stratagem.checkpoint.host_memory import allocate_host_memory
from stratagem.distributed import RankGroup

__all__ = ["StagedState", "Staging"]

# The alignment in bytes, sufficient for all dtypes and for the widest vector instructions.
_ALIGNMENT = 64


@final
@dataclass(frozen=True, slots=True)
class StagedState:
    """A flattened state tree, ready to be written. All values except tensors are already copied.

    Attributes:
        tensors: the tensors that this rank writes; they share memory with the tree.
        write: writes these tensors, or copies of them in the same order, to a path. Collective over the rank group.
    """

    tensors: Sequence[Tensor]
    write: Callable[[Sequence[Tensor], Path, RankGroup], None]


@final
class Staging:
    """A reusable CPU buffer for copies of tensors.

    If any tensor is on an accelerator, the buffer is page-locked, so that the copies are asynchronous.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        # The accelerator for which the buffer was allocated.
        self._accelerator: str | None = None
        self._shapes: list[tuple[torch.dtype, torch.Size]] = []
        self._copies: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """The size of the buffer in bytes."""
        return self._memory.numel()

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors to the buffer; return the copies, each with its own storage, valid until the next call."""
        if any(tensor.layout != torch.strided for tensor in tensors):
            # A sparse tensor consists of several tensors whose sizes may change, so clone it instead of using the
            # buffer.
            dense = iter(self.copy([tensor for tensor in tensors if tensor.layout == torch.strided]))
            return [next(dense) if tensor.layout == torch.strided else tensor.detach().clone() for tensor in tensors]
        accelerator = _accelerator_of(tensors)
        shapes = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if shapes != self._shapes or accelerator not in (None, self._accelerator):
            self._allocate(shapes, accelerator)
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=accelerator is not None)
        if accelerator is not None:
            torch.accelerator.current_stream().synchronize()
        return self._copies

    def _allocate(self, shapes: list[tuple[torch.dtype, torch.Size]], accelerator: str | None) -> None:
        sizes = [shape.numel() * dtype.itemsize for dtype, shape in shapes]
        offsets = list(itertools.accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0))
        # Release the old buffer first, so that two buffers never exist at the same time.
        self._copies = []
        if offsets[-1] > self.nbytes or accelerator not in (None, self._accelerator):
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = allocate_host_memory(offsets[-1], accelerator)
            self._accelerator = accelerator
        memory = self._memory.numpy()
        self._copies = [
            # Slice through NumPy, so that each slice has a separate storage; for a view, torch.save would write the
            # whole buffer.
            torch.from_numpy(memory[offset : offset + size]).view(dtype).view(shape)
            for (dtype, shape), offset, size in zip(shapes, offsets, sizes, strict=False)
        ]
        self._shapes = shapes


def _accelerator_of(tensors: Sequence[Tensor]) -> str | None:
    """Return the type of the accelerator that tensors are on; None if all of them are on the CPU."""
    return next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), None)
