"""Reading tensors to memory while they are verified returns the saved values or an error, never anything else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from stratagem.checkpoint import DirectoryFormat, ShardedTensorState
from stratagem.checkpoint.directory import verified_read
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.errors import CheckpointDamagedError

FORMAT = DirectoryFormat()
IN_MEMORY = ("state_dict", "optimizer")


def in_columns(tensor: torch.Tensor, parts: int) -> ShardedTensorState:
    """Return a tensor that is saved in boxes of columns, whose bytes alternate in the file."""
    width = tensor.shape[1] // parts
    boxes = [TensorBox((0, part * width), (tensor.shape[0], width)) for part in range(parts)]
    return ShardedTensorState(tensor.dtype, tensor.shape, {box: box.of(tensor) for box in boxes})


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of several dtypes and sizes, one of them without elements."""
    return {
        "matrix": torch.arange(35.0).reshape(5, 7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "half": torch.arange(9, dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j, 3 - 4j]),
        "columns": torch.arange(24, dtype=torch.int32).reshape(4, 6),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with these tensors in two parts."""
    sharded = {**tensors(), "columns": in_columns(tensors()["columns"], 3)}
    FORMAT.save({"state_dict": sharded, "optimizer": {"state": {"w": tensors()["matrix"]}}}, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(params=[5, 64, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of bytes that are verified at a time."""
    monkeypatch.setattr(verified_read, "_CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("in_memory", [(), IN_MEMORY], ids=["mapped", "in memory"])
@pytest.mark.usefixtures("chunk_bytes")
def test_tensors_have_the_saved_values(saved: Path, in_memory: tuple[str, ...]) -> None:
    """Tensors of all dtypes, sizes and shardings have the saved values, however they are divided into chunks."""
    loaded = FORMAT.load(saved, in_memory=in_memory)
    assert list(loaded["state_dict"]) == list(tensors())
    for name, expected in tensors().items():
        value = loaded["state_dict"][name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert torch.equal(value, expected), name
    assert torch.equal(loaded["optimizer"]["state"]["w"], tensors()["matrix"])


@pytest.mark.parametrize("in_memory", [(), IN_MEMORY], ids=["mapped", "in memory"])
@pytest.mark.usefixtures("chunk_bytes")
def test_a_change_of_any_byte_is_damage(saved: Path, in_memory: tuple[str, ...]) -> None:
    """A change of the first, a middle or the last byte of any tensor raises an error that names the tensor."""
    file = saved / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in set(tensors()) - {"empty"}:
        begin, end = header[name]["data_offsets"]
        for offset in {begin, (begin + end) // 2, end - 1}:
            changed = bytearray(data)
            changed[8 + length + offset] ^= 16
            file.write_bytes(changed)
            with pytest.raises(CheckpointDamagedError, match=rf"model\.safetensors: the tensor '{name}' is corrupted"):
                FORMAT.load(saved, in_memory=in_memory)


def test_tensors_in_memory_do_not_depend_on_the_file(saved: Path) -> None:
    """A file that is overwritten after the load does not change tensors in memory, which have separate storages."""
    loaded = FORMAT.load(saved, in_memory=IN_MEMORY)["state_dict"]
    for file in saved.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(loaded[name], expected) for name, expected in tensors().items())
    for one, other in itertools.combinations([each for each in loaded.values() if each.numel()], 2):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_a_file_that_shrinks_while_it_is_read_is_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is truncated after its size was checked raises an error."""
    read_at = verified_read.read_at
    monkeypatch.setattr(
        verified_read,
        "read_at",
        lambda descriptor, buffer, offset: read_at(descriptor, buffer, offset) if offset < 400 else 0,
    )
    with pytest.raises(CheckpointDamagedError, match="is corrupted"):
        FORMAT.load(saved, in_memory=IN_MEMORY)


@pytest.mark.parametrize("in_memory", [(), IN_MEMORY], ids=["mapped", "in memory"])
def test_an_error_of_the_disk_is_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, in_memory: tuple[str, ...]
) -> None:
    """An error while reading names the file, so that a run resumes from an earlier checkpoint."""

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verified_read, "read_at", fail)
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors cannot be read: .*Input/output error"):
        FORMAT.load(saved, in_memory=in_memory)
