"""The differences between two checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stratagem.checkpoint.convert.compare import CheckpointDifference, compare


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[CheckpointDifference]:
    """Return all differences."""
    return list(compare(first, second))


def test_equal_checkpoints_do_not_differ() -> None:
    """Equal tensors and values, including NaN in the same positions, are not reported."""
    tree = {"a": {"x": torch.tensor([1.0, float("nan")])}, "b": [1, "s", None, (2, 3)]}
    other = {"a": {"x": torch.tensor([1.0, float("nan")])}, "b": [1, "s", None, (2, 3)]}
    assert differences(tree, other) == []


def test_the_largest_difference_is_reported() -> None:
    """One of four elements differs by 0.5."""
    (found,) = differences({"a": {"x": torch.zeros(4)}}, {"a": {"x": torch.tensor([0.0, 0.5, 0.0, 0.0])}})
    assert (found.key, found.max_abs_diff, found.differing_fraction) == ("a/x", 0.5, 0.25)


def test_nan_is_an_infinite_difference() -> None:
    """A number that became NaN is an infinite difference, larger than all others."""
    (found,) = differences({"a": {"x": torch.zeros(2)}}, {"a": {"x": torch.tensor([0.0, float("nan")])}})
    assert (found.max_abs_diff, found.differing_fraction) == (float("inf"), 0.5)


def test_a_difference_in_the_last_chunk_is_found() -> None:
    """Tensors are compared in chunks, including the last one."""
    one = torch.zeros((1 << 22) + 3, dtype=torch.int8)
    other = one.clone()
    other[-1] = 7
    (found,) = differences({"a": {"x": one}}, {"a": {"x": other}})
    assert (found.max_abs_diff, found.differing_fraction) == (7.0, 1 / len(one))


def test_different_dtypes_and_shapes_are_described() -> None:
    """Tensors of different dtype or shape are described instead of compared."""
    first = {"a": {"x": torch.zeros(2), "y": torch.zeros(2)}}
    second = {"a": {"x": torch.zeros(2, dtype=torch.float64), "y": torch.zeros(3)}}
    assert [(each.key, each.first, each.second, each.max_abs_diff) for each in differences(first, second)] == [
        ("a/x", "float32 [2]", "float64 [2]", None),
        ("a/y", "float32 [2]", "float32 [3]", None),
    ]


def test_what_exists_on_one_side_is_reported_once() -> None:
    """A part, tensor or value that exists on one side only is reported once."""
    first = {"a": {"x": torch.zeros(1), "n": 1}, "p": {}}
    second = {"a": {"n": 1, "m": 2}}
    found = [(each.key, each.first, each.second) for each in differences(first, second)]
    assert found == [("a/x", "float32 [1]", ""), ("a/m", "", "2"), ("p", "present", "")]


def test_values_are_compared_by_their_path() -> None:
    """A differing learning rate is reported by its path, with both values."""
    first = {"optimizer": {"param_groups": [{"lr": 0.1}]}}
    second = {"optimizer": {"param_groups": [{"lr": 0.2}]}}
    assert differences(first, second) == [CheckpointDifference("optimizer/param_groups/0/lr", "0.1", "0.2")]


def test_module_versions_are_ignored() -> None:
    """A state dict with module versions equals a plain dict with the same entries."""
    state = nn.Linear(1, 1).state_dict()
    assert differences({"m": state}, {"m": dict(state)}) == []
