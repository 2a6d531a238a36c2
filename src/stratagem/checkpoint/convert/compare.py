"""What differs between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.tree.flatten import StateTree, flatten_tree

__all__ = ["CheckpointDifference", "compare"]

# Numbers of two tensors that are compared at once, so that mapped ones are never whole in memory.
_AT_ONCE = 1 << 22


@final
@dataclass(frozen=True, slots=True)
class CheckpointDifference:
    """Where two checkpoints differ.

    Attributes:
        key: the path in the tree, parts joined by ``/``.
        first: what the first has there, as text; empty where it has nothing.
        second: what the second has.
        most: the largest absolute difference of two tensors' numbers; None where they cannot be compared so.
        share: the share of a tensor's numbers that differ, from 0 to 1.
    """

    key: str
    first: str
    second: str
    most: float | None = None
    share: float | None = None


def compare(first: StateTree, second: StateTree) -> Iterator[CheckpointDifference]:
    """Yield each difference, part by part; NaN equals NaN, and nothing else is rounded."""
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
        most, count = _distance(one.reshape(-1), other.reshape(-1))
        if count:
            yield CheckpointDifference(key, _describe(one), _describe(other), most, count / one.numel())


def _distance(one: Tensor, other: Tensor) -> tuple[float | None, int]:
    """Return the largest absolute difference of two flat tensors, and how many of their numbers differ."""
    most, count = 0.0, 0
    for begin in range(0, one.numel(), _AT_ONCE):
        a, b = one[begin : begin + _AT_ONCE], other[begin : begin + _AT_ONCE]
        if torch.equal(a, b):
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        differing = ~((a == b) | (a.isnan() & b.isnan()))
        count += int(differing.sum())
        if differing.any():
            most = max(most, float((a - b).abs()[differing].nan_to_num(nan=float("inf")).max()))
    return most, count


def _compare_values(key: str, first: Any, second: Any) -> Iterator[CheckpointDifference]:
    first, second = _without_versions(first), _without_versions(second)
    if isinstance(first, dict) and isinstance(second, dict):
        for name in dict.fromkeys([*first, *second]):
            yield from _compare_values(f"{key}/{name}", first.get(name, _NOTHING), second.get(name, _NOTHING))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _compare_values(f"{key}/{index}", one, other)
    elif first != second and not _stands_for_tensor(first, second):
        yield CheckpointDifference(key, _text(first), _text(second))


def _stands_for_tensor(first: Any, second: Any) -> bool:
    """Tell whether this place holds a tensor on one side and nothing on the other: that was told already."""
    return any(isinstance(value, dict) and "$tensor" in value for value in (first, second)) and _NOTHING in (
        first,
        second,
    )


def _without_versions(value: Any) -> Any:
    """Leave out the versions that torch keeps beside a module's state: other forms have no place for them."""
    return value["$versioned"][0] if isinstance(value, dict) and set(value) == {"$versioned"} else value


_NOTHING = object()


def _text(value: Any) -> str:
    return "" if value is _NOTHING else repr(value)


def _describe(tensor: Tensor | None) -> str:
    return "" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
