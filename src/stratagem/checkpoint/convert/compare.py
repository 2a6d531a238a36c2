"""Compare two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.tree.flatten import StateTree, flatten_tree

__all__ = ["CheckpointDifference", "compare"]

# The number of elements to compare at a time, so that a memory-mapped tensor is never read into memory as a whole.
_CHUNK_ELEMENTS = 1 << 22


@final
@dataclass(frozen=True, slots=True)
class CheckpointDifference:
    """A difference between two checkpoints.

    Attributes:
        key: the path in the state tree, joined by ``/``.
        first: the value in the first checkpoint as text; empty if the key is missing.
        second: the value in the second checkpoint as text; empty if the key is missing.
        max_abs_diff: the largest absolute difference between two tensors; None if they cannot be compared elementwise.
        differing_fraction: the fraction of elements that differ, from 0 to 1.
    """

    key: str
    first: str
    second: str
    max_abs_diff: float | None = None
    differing_fraction: float | None = None


def compare(first: StateTree, second: StateTree) -> Iterator[CheckpointDifference]:
    """Yield all differences, part by part. NaN equals NaN; everything else must be exactly equal."""
    for part in dict.fromkeys([*first, *second]):
        if part not in first or part not in second:
            yield CheckpointDifference(part, "present" if part in first else "", "present" if part in second else "")
            continue
        (tensors, values), (other_tensors, other_values) = (
            flatten_tree(tree[part], where=part) for tree in (first, second)
        )
        yield from _compare_tensors(part, tensors, other_tensors)
        yield from _compare_values(part, values, other_values)


def _compare_tensors(
    part: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> Iterator[CheckpointDifference]:
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        key = f"{part}/{name}"
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            yield CheckpointDifference(key, _describe(one), _describe(other))
            continue
        max_abs_diff, count = _distance(one.reshape(-1), other.reshape(-1))
        if count:
            yield CheckpointDifference(key, _describe(one), _describe(other), max_abs_diff, count / one.numel())


def _distance(one: Tensor, other: Tensor) -> tuple[float | None, int]:
    """Return the largest absolute difference between two flat tensors and the number of elements that differ."""
    max_abs_diff, count = 0.0, 0
    for begin in range(0, one.numel(), _CHUNK_ELEMENTS):
        a, b = one[begin : begin + _CHUNK_ELEMENTS], other[begin : begin + _CHUNK_ELEMENTS]
        if torch.equal(a, b):
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        differing = ~((a == b) | (a.isnan() & b.isnan()))
        count += int(differing.sum())
        if differing.any():
            max_abs_diff = max(max_abs_diff, float((a - b).abs()[differing].nan_to_num(nan=float("inf")).max()))
    return max_abs_diff, count


def _compare_values(key: str, first: Any, second: Any) -> Iterator[CheckpointDifference]:
    first, second = _without_versions(first), _without_versions(second)
    if isinstance(first, dict) and isinstance(second, dict):
        for name in dict.fromkeys([*first, *second]):
            yield from _compare_values(f"{key}/{name}", first.get(name, _MISSING), second.get(name, _MISSING))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _compare_values(f"{key}/{index}", one, other)
    elif first != second and not _is_reported_tensor(first, second):
        yield CheckpointDifference(key, _text(first), _text(second))


def _is_reported_tensor(first: Any, second: Any) -> bool:
    """Return whether one value is a tensor and the other is missing, which has already been reported."""
    return any(isinstance(value, dict) and "$tensor" in value for value in (first, second)) and _MISSING in (
        first,
        second,
    )


def _without_versions(value: Any) -> Any:
    """Remove the module versions that torch attaches to state dicts; some formats do not store them."""
    return value["$versioned"][0] if isinstance(value, dict) and set(value) == {"$versioned"} else value


_MISSING = object()


def _text(value: Any) -> str:
    return "" if value is _MISSING else repr(value)


def _describe(tensor: Tensor | None) -> str:
    return "" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
