"""State trees are flattened to tensors and JSON and restored unchanged."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stratagem.checkpoint import flatten_tree, unflatten_tree
from stratagem.errors import CheckpointDamagedError, CheckpointError

KEYS = st.text(max_size=4) | st.sampled_from(["$tensor", "$items", "$", "a/b", "__metadata__"]) | st.integers(-3, 3)
TENSORS = st.integers(0, 99).map(torch.tensor)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.floats(allow_nan=False, allow_infinity=False) | st.booleans(), inner, max_size=2)
    ),
    max_leaves=12,
)


def equal(one: Any, other: Any) -> bool:
    """Return whether two trees have the same types, order of keys and values; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return equal(list(one), list(other)) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    return one == other


def through_json(tree: Any) -> Any:
    """Flatten a tree, convert the rest to JSON and back, and restore the tree."""
    tensors, skeleton = flatten_tree(tree)
    return unflatten_tree(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))


@given(TREES)
@pytest.mark.slow
def test_every_tree_is_restored(tree: Any) -> None:
    """Nested containers, numbers, strings, None and tensors are restored with their types and order."""
    assert equal(through_json(tree), tree)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1])
def test_floats_that_json_lacks_are_restored(number: float) -> None:
    """Infinity, NaN and subnormal numbers are restored exactly."""
    assert equal(through_json([number]), [number])


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        {1: torch.tensor(1), "1": torch.tensor(2)},
        {"x": {"": torch.tensor(1)}, "x/": torch.tensor(2), "x/'": torch.tensor(3)},
    ],
)
def test_similar_paths_do_not_collide(tree: Any) -> None:
    """Keys with slashes or of different types never make tensors collide."""
    assert equal(through_json(tree), tree)


def test_a_state_dict_keeps_its_names() -> None:
    """A flat dict of tensors is stored by exactly its own keys."""
    tensors, _ = flatten_tree({"0.weight": torch.ones(1), "head.bias": torch.zeros(1)})
    assert list(tensors) == ["0.weight", "head.bias"]


class Mode(enum.IntEnum):
    FAST = 3


class Kind(str, enum.Enum):  # noqa: UP042 -- str() of a member returns its name
    BEST = "best"


class Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.parametrize(
    ("special", "plain"),
    [
        (Mode.FAST, 3),
        (Kind.BEST, "best"),
        (np.float64(0.5), 0.5),
        (np.float64("nan"), math.nan),
        (Pair(1, 2), (1, 2)),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({Kind.BEST: 1}, {"best": 1}),
    ],
)
def test_subclasses_become_plain_types(special: Any, plain: Any) -> None:
    """Enums, NumPy floats, named tuples and ordered dicts are restored as plain types."""
    assert equal(unflatten_tree(*flatten_tree([special])), [plain])


def test_parameters_become_plain_tensors() -> None:
    """A parameter is stored by value, without the autograd graph."""
    [tensor] = unflatten_tree(*flatten_tree([nn.Parameter(torch.ones(2))]))
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


def test_versions_of_modules_are_kept() -> None:
    """The module versions in a state dict are restored."""
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    assert through_json(state)._metadata == {"": {"version": 1}, "0": {"version": 2}}


@pytest.mark.parametrize(
    ("tree", "path", "kind"),
    [
        ({"a": [0, {"b": {1.5, 2.5}}]}, "a/1/b", "set"),
        ({"a": (b"x",)}, "a/0", "bytes"),
        ({"a": np.datetime64("2026-01-01")}, "a", "datetime64"),
        ({"a": {"f": print}}, "a/f", "builtin_function_or_method"),
        (object(), "root", "object"),
    ],
)
def test_unsupported_values_are_rejected_with_their_path(tree: Any, path: str, kind: str) -> None:
    """A value of an unsupported type is rejected with its path and type."""
    with pytest.raises(CheckpointError, match=f"The checkpoint's {path} is {kind} .* without pickle"):
        flatten_tree(tree)


@pytest.mark.parametrize("key", [None, (1, 2), math.nan, math.inf, b"x"])
def test_unsupported_keys_are_rejected_with_their_path(key: Any) -> None:
    """A key that is neither a string nor a finite number is rejected with its path."""
    with pytest.raises(CheckpointError, match="The checkpoint's optimizer/a has the key"):
        flatten_tree({"a": {key: 1}}, where="optimizer")


def test_a_tree_that_contains_itself_is_rejected() -> None:
    """A list that contains itself raises an error instead of a RecursionError."""
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(CheckpointError, match="meta contains a reference to itself"):
        flatten_tree(tree, where="meta")


@pytest.mark.parametrize(
    "skeleton", [{"$tensor": "x"}, {"$tensor": []}, {"$float": "a"}, {"$float": None}, {"$tuple": 1}, {"$items": [[1]]}]
)
def test_malformed_json_descriptions_are_damage(skeleton: Any) -> None:
    """A malformed description of a tree is reported as damage."""
    with pytest.raises(CheckpointDamagedError):
        unflatten_tree({}, skeleton)
