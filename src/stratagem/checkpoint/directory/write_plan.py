"""Who writes which part of which tensor, decided alike on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from stratagem.checkpoint.directory.tensor_layout import DTYPES, FileLayout, TensorSpec
from stratagem.checkpoint.tree.boxes import TensorBox, box_of, boxes_cover
from stratagem.checkpoint.tree.flatten import StoredTensor
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.distributed.rank_group import Team
from stratagem.errors import CheckpointError
from stratagem.tensors.dtensor import is_sharded

__all__ = ["BoxAssignment", "WritePlan", "make_write_plan"]

# part of the tree -> name in the part -> what a rank tells of the tensor
_Told = dict[str, dict[str, tuple[TensorSpec, tuple[TensorBox, ...]]]]


@final
@dataclass(frozen=True, slots=True)
class BoxAssignment:
    """A box of a tensor, and the rank that writes it."""

    box: TensorBox
    rank: int


@final
@dataclass(frozen=True, slots=True)
class WritePlan:
    """How the tensors of a tree become files.

    Attributes:
        layouts: part of the tree -> the layout of its file; parts without tensors have none.
        assignments: part -> tensor name -> its boxes and their writers, ordered by box.
    """

    layouts: Mapping[str, FileLayout]
    assignments: Mapping[str, Mapping[str, tuple[BoxAssignment, ...]]]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(layout.size for layout in self.layouts.values())


def make_write_plan(parts: Mapping[str, Mapping[str, StoredTensor]], team: Team) -> WritePlan:
    """Plan the files for the tensors that the ranks hold, by part and name. Collective.

    A tensor that is spread over ranks is written by each rank that holds a part of it, and where several hold the same,
    as replicas do, by the first of them. All others are those of the team's first rank.

    Raises:
        CheckpointError: if a tensor cannot be stored, or the ranks' parts do not make up the whole.
    """
    told = team.each(lambda: _tell(parts, team))
    first = told[0]
    assignments: dict[str, dict[str, tuple[BoxAssignment, ...]]] = {}
    for part, tensors in first.items():
        assignments[part] = {}
        for name, (spec, _) in tensors.items():
            holders = [(rank, theirs[part][name]) for rank, theirs in enumerate(told) if name in theirs.get(part, {})]
            assignments[part][name] = _divide(f"{part}/{name}", spec, holders)
    layouts = {
        part: FileLayout.plan({name: spec for name, (spec, _) in tensors.items()})
        for part, tensors in first.items()
        if tensors
    }
    return WritePlan(layouts, assignments)


def _tell(parts: Mapping[str, Mapping[str, StoredTensor]], team: Team) -> _Told:
    """Describe this rank's tensors; a plain one counts on the first rank alone."""
    return {
        part: {
            name: (_spec(tensor, f"{part}/{name}"), _regions(tensor, f"{part}/{name}"))
            for name, tensor in tensors.items()
            if team.leads or isinstance(tensor, ShardedTensorState) or is_sharded(tensor)
        }
        for part, tensors in parts.items()
    }


def _regions(tensor: StoredTensor, name: str) -> tuple[TensorBox, ...]:
    return tuple(tensor.shards) if isinstance(tensor, ShardedTensorState) else (box_of(tensor, name),)


def _spec(tensor: StoredTensor, name: str) -> TensorSpec:
    if isinstance(tensor, ShardedTensorState):
        for content in tensor.shards.values():
            _spec(content, name)
        return TensorSpec(tensor.dtype, tuple(tensor.shape))
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "on the meta device" if tensor.is_meta else f"of {tensor.dtype} and {tensor.layout}"
        raise CheckpointError(
            f"The checkpoint's {name} is a tensor {kind}, which safetensors cannot hold. Convert it first, or save "
            "under a name that ends in .pth."
        )
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def _divide(
    name: str, spec: TensorSpec, holders: Sequence[tuple[int, tuple[TensorSpec, tuple[TensorBox, ...]]]]
) -> tuple[BoxAssignment, ...]:
    writers: dict[TensorBox, int] = {}
    for rank, (theirs, boxes) in holders:
        if theirs != spec:
            raise CheckpointError(
                f"The checkpoint's {name} is of {spec.dtype} and shape {list(spec.shape)} on rank 0, but of {theirs.dtype} "
                f"and {list(theirs.shape)} on rank {rank}. Every rank must hold the same model."
            )
        for box in boxes:
            if box.numel:
                writers.setdefault(box, rank)
    if not spec.nbytes:
        # So that a tensor without elements, of which nobody need have a part, is in the manifest.
        writers.setdefault(TensorBox.whole(spec.shape), 0)
    if not boxes_cover(list(writers), spec.shape):
        raise CheckpointError(
            f"The checkpoint's {name}: the ranks' parts {[(box.start, box.shape) for box in writers]} do not make "
            f"up a tensor of shape {list(spec.shape)}. Save on all ranks that hold a part of it."
        )
    return tuple(BoxAssignment(box, rank) for box, rank in sorted(writers.items()))
