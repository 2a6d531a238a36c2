"""Batches that a text describes."""

from __future__ import annotations

import pytest
import torch

from stratagem.errors import ConfigValueError
from stratagem.planning.batch import BatchSpec, describe_batch, parse_batch


def test_named_tensors_are_a_mapping_and_others_a_tuple() -> None:
    """The first dimension of the first tensor is the number of samples, and no tensor has memory."""
    named = parse_batch("tokens=int64[8,16],mask=bool[8]")
    assert list(named.batch) == ["tokens", "mask"]
    assert (named.batch["tokens"].shape, named.batch["mask"].dtype) == ((8, 16), torch.bool)
    assert (named.size, named.batch["tokens"].device.type) == (8, "meta")
    plain = parse_batch("float32[4,3],int64[4]").batch
    assert describe_batch(plain) == ("float32[4, 3]", "int64[4]")


def test_resizing_changes_only_dimensions_that_count_samples() -> None:
    """A tensor without samples keeps its shape, and a list of one item per sample gets as many items."""
    spec = BatchSpec.of({"x": torch.zeros(2, 3), "scale": torch.zeros(5), "names": ["a", "b"]})
    resized = spec.resized(3)
    assert (resized["x"].shape, resized["scale"].shape) == ((3, 3), (5,))
    assert resized["names"] == ["a", "b", "a"]


@pytest.mark.parametrize("text", ["", "int64", "int64[8", "float99[2]", "a=int64[2],float32[2]", "int64[2];int64[3]"])
def test_a_batch_that_cannot_be_parsed_is_refused(text: str) -> None:
    """The error shows an example."""
    with pytest.raises(ConfigValueError, match="tokens=int64"):
        parse_batch(text)


def test_a_batch_without_samples_is_refused() -> None:
    """A step without samples has no time per sample, so no dimension may be 0."""
    with pytest.raises(ConfigValueError, match=r"float32\[0,16\] has no elements"):
        parse_batch("float32[0,16],int64[0]")
    assert parse_batch("float32[10,16]").size == 10
