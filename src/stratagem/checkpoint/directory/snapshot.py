"""A tree of state, taken apart and ready to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.manifest import FILE_NAME
from stratagem.checkpoint.directory.write_plan import Plan, make_plan
from stratagem.checkpoint.tree.boxes import Region
from stratagem.checkpoint.tree.flatten import StateTree, StoredTensor, split_state
from stratagem.checkpoint.tree.sharded_tensor_state import Pieces
from stratagem.distributed import Team
from stratagem.errors import CheckpointError
from stratagem.tensors.dtensor import local_part

__all__ = ["Snapshot", "file_of", "take_snapshot"]

_FILE_OF = {"state_dict": "model"}


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank is to write of a tree.

    Attributes:
        plan: the files, the same on every rank.
        skeletons: part -> all of it that is no tensor, as JSON.
        mine: (part, name, region) of what this rank writes -> its content, which is the tree's own memory.
    """

    plan: Plan
    skeletons: Mapping[str, Any]
    mine: Mapping[tuple[str, str, Region], Tensor]

    def pieces(self, part: str) -> Iterator[tuple[str, Region, Tensor]]:
        """Yield (name, region, content) of what this rank writes into the file of a part."""
        for (of, name, region), content in self.mine.items():
            if of == part:
                yield name, region, content


def take_snapshot(tree: StateTree, team: Team) -> Snapshot:
    """Take a tree apart; nothing is copied. Collective: every rank gives a tree of the same shape.

    Raises:
        CheckpointError: if a value cannot be stored; it names the path.
    """
    split = team.own(lambda: _split(tree))
    tensors = {name: own for name, (own, _) in split.items()}
    plan = make_plan(tensors, team)
    mine = {}
    for part, by_name in plan.pieces.items():
        for name, pieces in by_name.items():
            for piece in pieces:
                if piece.rank == team.rank:
                    mine[part, name, piece.region] = _content(tensors[part][name], piece.region)
    return Snapshot(plan, {name: skeleton for name, (_, skeleton) in split.items()}, mine)


def _content(tensor: StoredTensor, region: Region) -> Tensor:
    if isinstance(tensor, Pieces):
        return tensor.contents[region] if region.numel else torch.empty(region.shape, dtype=tensor.dtype)
    return local_part(tensor)


def file_of(part: str) -> str:
    """Return the name of the file that holds the tensors of a part."""
    return f"{_FILE_OF.get(part, part)}.safetensors"


def _split(tree: StateTree) -> dict[str, tuple[dict[str, StoredTensor], Any]]:
    for name in tree:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"The checkpoint has a part {name!r}, but parts are files: their names are strings that do not begin "
                "with a dot and have no slash, backslash or colon. Rename it."
            )
    for name, stem in _FILE_OF.items():
        if name in tree and stem in tree:
            raise CheckpointError(
                f"The checkpoint has parts {name!r} and {stem!r}, which are one file. Rename {stem!r}."
            )
    return {name: split_state(part, where=name) for name, part in tree.items()}
