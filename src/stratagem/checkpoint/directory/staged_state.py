"""State that is ready to be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from stratagem.distributed import Team

__all__ = ["Captured"]


@final
@dataclass(frozen=True, slots=True)
class Captured:
    """A tree of state, taken apart: all that is no tensor is a copy already.

    Attributes:
        tensors: what this rank writes; the tree's own memory.
        publish: writes these tensors, or copies of them in the same order, under a path. Collective over the team.
    """

    tensors: Sequence[Tensor]
    publish: Callable[[Sequence[Tensor], Path, Team], None]
