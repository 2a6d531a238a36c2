"""Gather parameters from the partitions of DeepSpeed's ZeRO."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from stratagem.errors import CheckpointDamagedError

__all__ = ["ZeroPartition", "FlatPartition", "PerParameterPartition"]

Shapes = Mapping[str, Sequence[int]]


class ZeroPartition(ABC):
    """The partitioning of a group's parameters across ranks.

    Attributes:
        shapes: a mapping from parameter names to shapes, in order.
    """

    shapes: Shapes

    @abstractmethod
    def gather(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for each parameter, given all ranks' partitions in order.

        Raises:
            CheckpointDamagedError: if the partitions are too short.
        """


@final
@dataclass(frozen=True, slots=True)
class FlatPartition(ZeroPartition):
    """ZeRO stages 1 and 2: the parameters are concatenated, and each rank has a consecutive range of the result.

    Attributes:
        shapes: a mapping from parameter names to shapes, in order.
        paddings: the number of padding elements after each parameter.
    """

    shapes: Shapes
    paddings: Sequence[int] = ()

    def gather(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        flat = torch.cat([part.reshape(-1) for part in parts])
        offset = 0
        for index, (name, shape) in enumerate(self.shapes.items()):
            count = math.prod(shape)
            _check_length(flat.numel(), offset + count, name)
            # Clone the slice, so that a single parameter does not keep the memory of the whole group alive.
            yield name, flat[offset : offset + count].reshape(tuple(shape)).clone()
            offset += count + (self.paddings[index] if self.paddings else 0)


@final
@dataclass(frozen=True, slots=True)
class PerParameterPartition(ZeroPartition):
    """ZeRO stage 3: each parameter is split into equal parts, one for each rank.

    Attributes:
        shapes: a mapping from parameter names to shapes, in order.
    """

    shapes: Shapes

    def gather(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            size = math.ceil(count / len(parts))
            _check_length(min(part.numel() for part in parts), offset + size, name)
            full = torch.cat([part.reshape(-1)[offset : offset + size] for part in parts])
            yield name, full[:count].reshape(tuple(shape)).clone()
            offset += size


def _check_length(length: int, expected: int, name: str) -> None:
    if length < expected:
        raise CheckpointDamagedError(
            f"the partitions of all ranks end before {name!r}: expected {expected} elements, got {length}."
        )
