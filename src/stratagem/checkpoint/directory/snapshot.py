"""Flatten a state tree and select what each rank writes."""

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
from stratagem.distributed import RankGroup
from stratagem.errors import CheckpointError
from stratagem.tensors.dtensor import to_local

__all__ = ["Snapshot", "file_of", "take_snapshot"]

_FILE_OF = {"state_dict": "model"}


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """A flattened state tree, with the boxes that this rank writes.

    Attributes:
        plan: the files and the writer of each box; the same on every rank.
        skeletons: a mapping from parts to their non-tensor values as JSON.
        local_boxes: a mapping from (part, tensor name, box) to the values that this rank writes, which share memory
            with the tree.
    """

    plan: WritePlan
    skeletons: Mapping[str, Any]
    local_boxes: Mapping[tuple[str, str, TensorBox], Tensor]

    def boxes_of(self, part: str) -> Iterator[tuple[str, TensorBox, Tensor]]:
        """Yield (tensor name, box, values) for each box that this rank writes to the file of ``part``."""
        for (of, name, box), content in self.local_boxes.items():
            if of == part:
                yield name, box, content


def take_snapshot(tree: StateTree, rank_group: RankGroup) -> Snapshot:
    """Flatten a state tree without copying tensors. Collective: the trees of all ranks must have the same structure.

    Raises:
        CheckpointError: if a value cannot be stored; the message contains its path.
    """
    split = rank_group.run_checked(lambda: _flatten_parts(tree))
    tensors = {name: own for name, (own, _) in split.items()}
    plan = make_write_plan(tensors, rank_group)
    local_boxes = {}
    for part, by_name in plan.assignments.items():
        for name, assignments in by_name.items():
            for assignment in assignments:
                if assignment.rank == rank_group.rank:
                    local_boxes[part, name, assignment.box] = _box_values(tensors[part][name], assignment.box)
    return Snapshot(plan, {name: skeleton for name, (_, skeleton) in split.items()}, local_boxes)


def _box_values(tensor: StoredTensor, box: TensorBox) -> Tensor:
    if isinstance(tensor, ShardedTensorState):
        return tensor.shards[box] if box.numel else torch.empty(box.shape, dtype=tensor.dtype)
    return to_local(tensor)


def file_of(part: str) -> str:
    """Return the name of the file that holds the tensors of ``part``."""
    return f"{_FILE_OF.get(part, part)}.safetensors"


def _flatten_parts(tree: StateTree) -> dict[str, tuple[dict[str, StoredTensor], Any]]:
    for name in tree:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{name!r} is not a valid name for a part of a checkpoint, because each part is saved as a file. Use a "
                "string that does not start with a dot and does not contain slashes, backslashes or colons."
            )
    for name, stem in _FILE_OF.items():
        if name in tree and stem in tree:
            raise CheckpointError(
                f"The checkpoint has parts {name!r} and {stem!r}, which would be saved to the same file. Rename {stem!r}."
            )
    return {name: flatten_state(part, where=name) for name, part in tree.items()}
