"""Put parameters together again that DeepSpeed's ZeRO cut into parts."""

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
    """How the parameters of a group lie in the ranks' parts.

    Attributes:
        shapes: of the parameters by name, in their order.
    """

    shapes: Shapes

    @abstractmethod
    def whole(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of each parameter, from the parts of all ranks in order.

        Raises:
            CheckpointDamagedError: if the parts are too short.
        """


@final
@dataclass(frozen=True, slots=True)
class FlatPartition(ZeroPartition):
    """Stages 1 and 2: all parameters one after another, and each rank has a stretch of that.

    Attributes:
        shapes: of the parameters by name, in their order.
        gaps: how many elements of padding follow each.
    """

    shapes: Shapes
    gaps: Sequence[int] = ()

    def whole(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        flat = torch.cat([part.reshape(-1) for part in parts])
        place = 0
        for index, (name, shape) in enumerate(self.shapes.items()):
            count = math.prod(shape)
            _require(flat.numel(), place + count, name)
            # In memory of its own: the parameters of a group are not kept alive by one of them.
            yield name, flat[place : place + count].reshape(tuple(shape)).clone()
            place += count + (self.gaps[index] if self.gaps else 0)


@final
@dataclass(frozen=True, slots=True)
class PerParameterPartition(ZeroPartition):
    """Stage 3: each parameter is cut into equal parts, and each rank has one of each.

    Attributes:
        shapes: of the parameters by name, in their order.
    """

    shapes: Shapes

    def whole(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        place = 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            size = math.ceil(count / len(parts))
            _require(min(part.numel() for part in parts), place + size, name)
            full = torch.cat([part.reshape(-1)[place : place + size] for part in parts])
            yield name, full[:count].reshape(tuple(shape)).clone()
            place += size


def _require(length: int, due: int, name: str) -> None:
    if length < due:
        raise CheckpointDamagedError(f"the ranks' parts end before {name!r}: {length} elements, and {due} are due.")
