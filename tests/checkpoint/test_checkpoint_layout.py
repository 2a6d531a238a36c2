"""The layout of safetensors files, compared with the safetensors library."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from stratagem.checkpoint.directory.tensor_layout import DTYPES, FileLayout, TensorSpec
from stratagem.errors import CheckpointDamagedError, CheckpointError

SPECS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(TensorSpec, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


@pytest.mark.slow
@given(SPECS)
def test_the_library_reads_the_planned_layout(specs: dict[str, TensorSpec]) -> None:
    """The safetensors library reads back the bytes written at the planned offsets, for every dtype and shape."""
    layout = FileLayout.plan(specs)
    file = bytearray(layout.header.ljust(layout.size, b"\x00"))
    for number, (name, spec) in enumerate(specs.items()):
        file[layout.starts[name] : layout.starts[name] + spec.nbytes] = bytes([number % 2]) * spec.nbytes
    tensors = load(bytes(file))
    assert {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == specs
    for number, name in enumerate(specs):
        assert set(tensors[name].flatten().view(torch.uint8).tolist()) <= {number % 2}


@given(SPECS)
def test_a_layout_is_read_as_it_was_planned(specs: dict[str, TensorSpec]) -> None:
    """A layout can be restored from the file header."""
    layout = FileLayout.plan(specs)
    found = FileLayout.read(layout.header, layout.size)
    assert (found.specs, found.starts, found.size) == (layout.specs, layout.starts, layout.size)


def test_a_file_written_by_the_library_is_read() -> None:
    """The layout of a file written by safetensors is read correctly."""
    data = save({"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.float16)}, {"by": "somebody"})
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    layout = FileLayout.read(header, len(data))
    assert data[layout.starts["a"] :][:24] == b"".join(number.to_bytes(8, "little") for number in range(3))
    assert layout.specs["b"] == TensorSpec(torch.float16, (2, 2))


def test_every_tensor_is_aligned_to_its_item_size() -> None:
    """Every tensor is aligned to its item size, so that a mapped file can be used directly."""
    layout = FileLayout.plan({dtype: TensorSpec(kind, (3,)) for kind, dtype in DTYPES.items()})
    assert all(layout.starts[name] % spec.dtype.itemsize == 0 for name, spec in layout.specs.items())
    assert len(layout.header) % 64 == 0


def test_chunks_are_in_bytes_of_the_file() -> None:
    """The second and third of four 8-byte elements start 8 bytes after the start of the tensor."""
    layout = FileLayout.plan({"a": TensorSpec(torch.int64, (4,))})
    assert list(layout.chunks("a", iter([(1, 2)]))) == [(len(layout.header) + 8, 16)]


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_rejected(size: int) -> None:
    """A header that does not match the file size is reported as damage."""
    layout = FileLayout.plan({"a": TensorSpec(torch.int64, (4,))})
    with pytest.raises(CheckpointDamagedError, match="its tensors should occupy 32 bytes"):
        FileLayout.read(layout.header, layout.size + size)


@pytest.mark.slow
def test_a_too_large_header_is_rejected() -> None:
    """A header larger than safetensors supports is not written."""
    name = "x" * 100_000_001
    with pytest.raises(CheckpointError, match=r"header of 10000\d{4} bytes"):
        FileLayout.plan({name: TensorSpec(torch.int64, ())})


def test_the_size_of_a_tensor_is_that_of_its_elements() -> None:
    """The size of a tensor is the number of its elements times their size; it is 0 for an empty tensor."""
    assert TensorSpec(torch.float64, (3, 5)).nbytes == math.prod((3, 5, 8))
    assert TensorSpec(torch.float64, (3, 0)).nbytes == 0
    assert TensorSpec(torch.bool, ()).nbytes == 1


def test_the_header_is_padded_json() -> None:
    """The header is padded JSON as described at https://huggingface.co/docs/safetensors."""
    header = FileLayout.plan({"a": TensorSpec(torch.int64, (4,))}).header
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]},
    }


@pytest.mark.parametrize(
    "offsets", [[0.0, 8], [0, 8.0], [-8, 0], [False, 8], [0], [0, 8, 8], "08", None, {"0": 8}, ["0", "8"], [0, 1e400]]
)
def test_offsets_that_are_not_integers_are_damage(offsets: object) -> None:
    """Numbers that are equal to the offsets but of another type, and other values, are reported as damage."""
    entry = {"x": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}
    text = json.dumps(entry).encode()
    header = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointDamagedError, match="The header of the file cannot be read"):
        FileLayout.read(header, len(header) + 8)


@pytest.mark.parametrize("shape", [[2.0], [True, 2], [-2], 2, None, [None], "2"])
def test_shapes_that_are_not_integers_are_damage(shape: object) -> None:
    """A shape that is not a list of non-negative integers is reported as damage."""
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    header = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointDamagedError, match="The header of the file cannot be read"):
        FileLayout.read(header, len(header) + 8)
