"""The comparison of recorded training jobs reports a single bit that differs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that compares two revisions."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bits")


def recorded(bits: ModuleType) -> dict:
    """Return a record of two iterations on one rank."""
    values = {}
    for iteration in (1, 2):
        for category, name in (("losses", "loss"), ("gradients", "weight"), ("gradients", "bias")):
            key = bits.Key(run="whole", iteration=iteration, category=category, rank=0, name=name)
            values[key] = torch.full((3,), float(iteration))
    return values


def flipped(values: dict, *, iteration: int, name: str) -> dict:
    """Return the values with the lowest bit of the middle element of a tensor flipped."""
    changed = {key: value.clone() for key, value in values.items()}
    tensor = next(value for key, value in changed.items() if (key.iteration, key.name) == (iteration, name))
    tensor.view(torch.int32)[1] ^= 1
    return changed


def test_equal_records_have_no_problem(bits: ModuleType) -> None:
    """The number of compared values is reported by category, and NaNs with the same bits are equal."""
    base = recorded(bits)
    base[next(iter(base))][0] = float("nan")
    tree = {key: value.clone() for key, value in base.items()}
    result = bits.compare(base, tree, ["losses", "gradients"])
    assert result.problems == ()
    assert (result.counts, result.different) == ({"losses": 2, "gradients": 4}, {})


def test_a_flipped_bit_is_the_first_difference(bits: ModuleType) -> None:
    """The earliest difference is reported with iteration, rank, name, and both values as numbers and bytes."""
    base = recorded(bits)
    tree = flipped(flipped(base, iteration=2, name="loss"), iteration=1, name="bias")
    result = bits.compare(base, tree, ["losses", "gradients"])
    assert result.different == {"losses": 1, "gradients": 1}
    (problem,) = result.problems
    assert "whole run, iteration 1, rank 0, gradients: bias\n" in problem
    assert "1 of 3 elements differ, first element 1" in problem
    assert "base: 1.0, bytes 0000803f" in problem
    assert "tree: 1.0000001192092896, bytes 0100803f" in problem


def test_zeros_of_different_signs_differ(bits: ModuleType) -> None:
    """Values that are equal as numbers but differ in their bytes are reported."""
    assert not bits.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bits.same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not bits.same_bits(torch.ones(2), torch.ones(2, 1))
    assert bits.same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_a_value_that_one_record_lacks_is_a_difference(bits: ModuleType) -> None:
    """A value that only one revision recorded is reported as a difference."""
    base = recorded(bits)
    tree = dict(list(base.items())[:-1])
    assert bits.compare(base, tree, []).different == bits.compare(tree, base, []).different == {"gradients": 1}
    assert "tree: not recorded" in bits.compare(base, tree, []).problems[0]


def test_an_added_entry_of_a_checkpoint_is_listed_but_is_no_difference(bits: ModuleType) -> None:
    """A new entry changes the digest of its file as well; an entry that only the base saves is a difference."""

    def key(name: str) -> Any:
        return bits.Key(run="whole", iteration=1, category="checkpoint", rank=-1, name=name)

    base = {key("state.json/meta/epoch"): "1", key("manifest.json/files/state.json/size"): "10"}
    tree = {**base, key("state.json/meta/new"): "2", key("manifest.json/files/state.json/size"): "19"}
    result = bits.compare(base, tree, [])
    assert (result.problems, result.added) == ((), ("state.json/meta/new",))
    assert bits.compare(tree, base, []).problems
    assert bits.compare(base, {**tree, key("state.json/meta/epoch"): "2"}, []).problems


def test_an_empty_category_is_a_problem(bits: ModuleType) -> None:
    """A category that was not recorded at all is reported as a problem instead of as equal."""
    base = recorded(bits)
    assert bits.compare(base, base, ["losses", "moments"]).problems == (
        "no moments were recorded, so none were compared",
    )
