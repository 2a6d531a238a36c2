"""Batches that group their samples without stacking them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from stratagem.data import pseudo_collate
from stratagem.errors import ConfigTypeError


class Pair(NamedTuple):
    """A sample with named fields."""

    image: Any
    label: Any


@pytest.mark.parametrize(
    ("samples", "batch"),
    [
        ([1, 2], [1, 2]),
        (["ab", "cd"], ["ab", "cd"]),
        ([None, 1], [None, 1]),
        ([(1, "a"), (2, "b")], [[1, 2], ["a", "b"]]),
        ([[1, 2], [3, 4]], [[1, 3], [2, 4]]),
        ([{"x": 1, "y": {"z": 2}}, {"y": {"z": 4}, "x": 3}], {"x": [1, 3], "y": {"z": [2, 4]}}),
        ([Pair(1, "a"), Pair(2, "b")], Pair([1, 2], ["a", "b"])),
        ([({"x": 1}, 5)], [{"x": [1]}, [5]]),
    ],
)
def test_fields_are_grouped(samples: list[Any], batch: Any) -> None:
    """Mappings and named tuples keep their type; other sequences become a list with one item per field."""
    collated = pseudo_collate(samples)
    assert collated == batch
    assert type(collated) is type(batch)


def test_tensors_are_not_stacked() -> None:
    """Tensors of different sizes can be in one batch and are not copied."""
    images = [torch.zeros(1, 2), torch.zeros(3, 4)]
    inputs, targets = pseudo_collate([(images[0], 0), (images[1], 1)])
    assert inputs[0] is images[0]
    assert inputs[1] is images[1]
    assert targets == [0, 1]


def test_samples_with_different_numbers_of_fields_are_rejected() -> None:
    """Samples with different numbers of fields raise an error."""
    with pytest.raises(ConfigTypeError, match=r"different numbers of fields: \[2, 3\]"):
        pseudo_collate([(1, 2), (1, 2, 3)])


@pytest.mark.parametrize("samples", [[{"x": 1, "y": 2}, {"x": 1}], [{"x": 1}, {"x": 1, "y": 2}]])
def test_samples_with_different_keys_are_rejected(samples: list[Any]) -> None:
    """A key that is missing in one sample raises an error."""
    with pytest.raises(ConfigTypeError, match=r"\['y'\] are not in all of them"):
        pseudo_collate(samples)
