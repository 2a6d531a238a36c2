"""A tree of state, taken apart and ready to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.manifest import FILE_NAME
from stratagem.checkpoint.directory.write_plan import WritePlan, make_write_plan
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.checkpoint.tree.flatten import StateTree, StoredTensor, flatten_state
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
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
        local_boxes: (part, name, box) of what this rank writes -> its content, which is the tree's own memory.
    """

    plan: WritePlan
    skeletons: Mapping[str, Any]
    local_boxes: Mapping[tuple[str, str, TensorBox], Tensor]

    def boxes_of(self, part: str) -> Iterator[tuple[str, TensorBox, Tensor]]:
        """Yield (name, box, content) of what this rank writes into the file of a part."""
        for (of, name, box), content in self.local_boxes.items():
            if of == part:
                yield name, box, content


def take_snapshot(tree: StateTree, team: Team) -> Snapshot:
    """Take a tree apart; nothing is copied. Collective: every rank gives a tree of the same shape.

    Raises:
        CheckpointError: if a value cannot be stored; it names the path.
    """
    split = team.own(lambda: _split(tree))
    tensors = {name: own for name, (own, _) in split.items()}
    plan = make_write_plan(tensors, team)
    local_boxes = {}
    for part, by_name in plan.assignments.items():
        for name, pieces in by_name.items():
            for piece in pieces:
                if piece.rank == team.rank:
                    local_boxes[part, name, piece.box] = _content(tensors[part][name], piece.box)
    return Snapshot(plan, {name: skeleton for name, (_, skeleton) in split.items()}, local_boxes)


def _content(tensor: StoredTensor, box: TensorBox) -> Tensor:
    if isinstance(tensor, ShardedTensorState):
        return tensor.shards[box] if box.numel else torch.empty(box.shape, dtype=tensor.dtype)
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
    return {name: flatten_state(part, where=name) for name, part in tree.items()}
