"""Batches that group their samples without stacking them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from stratagem.data import pseudo_collate
from stratagem.data.collate import default_collate_in_process
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


class OwnTuple(tuple):
    """A subclass of tuple."""


class OwnTensor(torch.Tensor):
    """A subclass of tensor."""


def batch_as_text(collate: Any, samples: list[Any]) -> str:
    """Return the batch, with types and dtypes, or the error."""
    try:
        batch = collate(samples)
    except Exception as error:  # noqa: BLE001 -- compared with the error of torch
        return repr(error)

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return type(value).__name__, str(value.dtype), value.tolist()
        if isinstance(value, dict):
            return type(value).__name__, {key: describe(inner) for key, inner in value.items()}
        return (
            (type(value).__name__, [describe(inner) for inner in value]) if isinstance(value, list | tuple) else value
        )

    return repr(describe(batch))


ONE, TWO = torch.arange(3.0), torch.arange(3.0) + 1
SAMPLES: dict[str, list[Any]] = {
    "tensors": [ONE, TWO],
    "integers": [1, 2],
    "large integers": [2**40, 1],
    "floats": [0.5, 0.1],
    "booleans": [True, False],
    "mixed numbers": [1, 0.5],
    "strings": ["a", "b"],
    "None": [None, None],
    "arrays": [np.arange(3), np.arange(3)],
    "array scalars": [np.float32(1), np.float32(2)],
    "tuples": [(ONE, 1, 0.5), (TWO, 2, 1.5)],
    "tuples of one": [(ONE,), (TWO,)],
    "empty tuples": [(), ()],
    "tuples with a string": [(ONE, "a"), (TWO, "b")],
    "nested tuples": [(ONE, (1, 2)), (TWO, (3, 4))],
    "lists": [[ONE, 1], [TWO, 2]],
    "dicts": [{"x": ONE, "y": 1}, {"x": TWO, "y": 2}],
    "dicts in another order": [{"x": ONE, "y": 1}, {"y": 2, "x": TWO}],
    "nested dicts": [{"x": {"z": ONE}}, {"x": {"z": TWO}}],
    "a missing key": [{"x": ONE, "y": 1}, {"x": TWO}],
    "an additional key": [{"x": ONE}, {"x": TWO, "y": 1}],
    "an ordered dict": [OrderedDict(x=ONE), OrderedDict(x=TWO)],
    "named tuples": [Pair(ONE, 1), Pair(TWO, 2)],
    "a subclass of tuple": [OwnTuple((ONE, 1)), OwnTuple((TWO, 2))],
    "a subclass of tensor": [ONE.as_subclass(OwnTensor), TWO.as_subclass(OwnTensor)],
    "different lengths": [(ONE, 1), (TWO,)],
    "different shapes": [(ONE, 1), (torch.ones(4), 2)],
    "different dtypes": [ONE, torch.ones(3, dtype=torch.float64)],
    "different types": [(ONE, 1), (1, TWO)],
    "sparse tensors": [ONE.to_sparse(), TWO.to_sparse()],
    "one sample": [(ONE, 1)],
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_batches_in_the_main_process_equal_those_of_torch(name: str) -> None:
    """Values, types, dtypes and errors are those of ``default_collate``."""
    samples = SAMPLES[name]
    assert batch_as_text(default_collate_in_process, samples) == batch_as_text(default_collate, samples)


@pytest.mark.parametrize("kind", [torch.Tensor, tuple])
def test_functions_that_users_register_are_called(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """A function in torch's registry replaces the stacking, also for types that have no function by default."""
    monkeypatch.setitem(default_collate_fn_map, kind, lambda samples, **_: len(samples))
    samples = [(ONE, 1), (TWO, 2)]
    assert str(default_collate_in_process(samples)) == str(default_collate(samples))


def test_a_registered_base_class_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function for a base class of the samples is called."""
    monkeypatch.setitem(default_collate_fn_map, object, lambda samples, **_: "object")
    assert default_collate_in_process([(ONE, 1)]) == default_collate([(ONE, 1)]) == "object"
