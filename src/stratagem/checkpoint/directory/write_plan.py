"""Plan which rank writes which box of each tensor; every rank computes the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from stratagem.checkpoint.directory.tensor_layout import DTYPES, FileLayout, TensorSpec
from stratagem.checkpoint.tree.boxes import TensorBox, box_of, boxes_cover
from stratagem.checkpoint.tree.flatten import StoredTensor
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.distributed.rank_group import RankGroup
from stratagem.errors import CheckpointError
from stratagem.tensors.dtensor import is_sharded

__all__ = ["BoxAssignment", "WritePlan", "make_write_plan", "spec_of"]

# A mapping from part to tensor name to the tensor's spec and the boxes that a rank holds.
_Descriptions = dict[str, dict[str, tuple[TensorSpec, tuple[TensorBox, ...]]]]


@final
@dataclass(frozen=True, slots=True)
class BoxAssignment:
    """A box of a tensor and the rank that writes it."""

    box: TensorBox
    rank: int


@final
@dataclass(frozen=True, slots=True)
class WritePlan:
    """The assignment of a state tree's tensors to files and writers.

    Attributes:
        layouts: a mapping from parts to file layouts, without parts that have no tensors.
        assignments: a mapping from part to tensor name to the tensor's boxes and their writers, ordered by box.
    """

    layouts: Mapping[str, FileLayout]
    assignments: Mapping[str, Mapping[str, tuple[BoxAssignment, ...]]]

    @property
    def size(self) -> int:
        """The total size of all files in bytes."""
        return sum(layout.size for layout in self.layouts.values())


def make_write_plan(parts: Mapping[str, Mapping[str, StoredTensor]], rank_group: RankGroup) -> WritePlan:
    """Plan the files for the tensors of all ranks, given by part and name. Collective.

    Each rank writes the boxes of sharded tensors that it holds; if several ranks hold the same box, as replicas do, the
    first one writes it. The first rank writes all other tensors.

    Raises:
        CheckpointError: if a tensor cannot be stored, or the boxes of all ranks do not cover it.
    """
    descriptions = rank_group.run_all(lambda: _describe_tensors(parts, rank_group))
    first = descriptions[0]
    assignments: dict[str, dict[str, tuple[BoxAssignment, ...]]] = {}
    for part, tensors in first.items():
        assignments[part] = {}
        for name, (spec, _) in tensors.items():
            holders = [
                (rank, theirs[part][name]) for rank, theirs in enumerate(descriptions) if name in theirs.get(part, {})
            ]
            assignments[part][name] = _assign_writers(f"{part}/{name}", spec, holders)
    layouts = {
        part: FileLayout.plan({name: spec for name, (spec, _) in tensors.items()})
        for part, tensors in first.items()
        if tensors
    }
    return WritePlan(layouts, assignments)


def _describe_tensors(parts: Mapping[str, Mapping[str, StoredTensor]], rank_group: RankGroup) -> _Descriptions:
    """Describe this rank's tensors; unsharded tensors are described by the first rank only."""
    return {
        part: {
            name: (spec_of(tensor, f"{part}/{name}"), _local_boxes(tensor, f"{part}/{name}"))
            for name, tensor in tensors.items()
            if rank_group.is_rank0 or isinstance(tensor, ShardedTensorState) or is_sharded(tensor)
        }
        for part, tensors in parts.items()
    }


def _local_boxes(tensor: StoredTensor, name: str) -> tuple[TensorBox, ...]:
    return tuple(tensor.shards) if isinstance(tensor, ShardedTensorState) else (box_of(tensor, name),)


def spec_of(tensor: StoredTensor, name: str) -> TensorSpec:
    """Return the dtype and the shape of a tensor in a file.

    Raises:
        CheckpointError: if safetensors cannot store it.
    """
    if isinstance(tensor, ShardedTensorState):
        for content in tensor.shards.values():
            spec_of(content, name)
        return TensorSpec(tensor.dtype, tuple(tensor.shape))
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        kind = "on the meta device" if tensor.is_meta else f"with dtype {tensor.dtype} and layout {tensor.layout}"
        raise CheckpointError(
            f"The checkpoint's {name} is a tensor {kind}, which safetensors cannot store. Convert it first, or save to "
            "a file name that ends in .pth."
        )
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def _assign_writers(
    name: str, spec: TensorSpec, holders: Sequence[tuple[int, tuple[TensorSpec, tuple[TensorBox, ...]]]]
) -> tuple[BoxAssignment, ...]:
    writers: dict[TensorBox, int] = {}
    for rank, (theirs, boxes) in holders:
        if theirs != spec:
            raise CheckpointError(
                f"The checkpoint's {name} has dtype {spec.dtype} and shape {list(spec.shape)} on rank 0, but "
                f"{theirs.dtype} and {list(theirs.shape)} on rank {rank}. All ranks must have the same model."
            )
        for box in boxes:
            if box.numel:
                writers.setdefault(box, rank)
    if not spec.nbytes:
        # Keep a tensor without elements in the manifest, even if no rank holds a box of it.
        writers.setdefault(TensorBox.whole(spec.shape), 0)
    if not boxes_cover(list(writers), spec.shape):
        raise CheckpointError(
            f"The checkpoint's {name}: the boxes of all ranks, {[(box.start, box.shape) for box in writers]}, do not "
            f"cover a tensor of shape {list(spec.shape)}. All ranks that hold a part of this tensor must take part in "
            "the save."
        )
    return tuple(BoxAssignment(box, rank) for box, rank in sorted(writers.items()))
