"""Write and read the files of a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stratagem.errors import TraceError
from stratagem.trace import TraceWriter, Value, read_trace


def write(path: Path, tensor: Tensor, *, rank: int = 0, world_size: int = 1, steps: int = 1) -> Path:
    """Write a trace with one tensor."""
    writer = TraceWriter(path, rank=rank, world_size=world_size, label="a test")
    for _ in range(steps):
        writer.put("after", {"w": tensor})
        writer.end_step()
    return writer.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.empty(0, 3),
        torch.ones(4, 6).t()[1:],
        torch.eye(3).to_sparse(),
    ],
    ids=["nan", "integer", "bfloat16", "bool", "complex", "empty", "strided", "sparse"],
)
def test_tensors_are_read_as_they_were_written(tmp_path: Path, tensor: Tensor) -> None:
    """All bits, the shape and the dtype are equal."""
    [step] = read_trace(write(tmp_path / "a.json", tensor)).ranks[0].steps
    assert step.after is not None
    value = step.after["w"]
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    assert value.shape == tuple(tensor.shape)
    assert value.dtype == str(tensor.dtype).removeprefix("torch.")
    torch.testing.assert_close(value.numbers.view(dense.shape), dense, rtol=0, atol=0, equal_nan=True)


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    """Five steps with the same tensor take the space of one."""
    write(tmp_path / "a.json", torch.ones(1000), steps=5)
    assert (tmp_path / "a.values").stat().st_size == 4000


def test_large_tensors_are_stored_as_summaries_of_fixed_size(tmp_path: Path) -> None:
    """Without ``full``, a tensor of a million elements takes 321 numbers."""
    writer = TraceWriter(tmp_path / "a.json", full=False)
    writer.put("after", {"w": torch.arange(1_000_000.0)})
    writer.end_step()
    trace = read_trace(writer.close())
    assert (tmp_path / "a.values").stat().st_size == 321 * 8
    value = (trace.ranks[0].steps[0].after or {})["w"]
    assert value.is_summary
    assert value.numbers[0] == 1_000_000 * 999_999 / 2
    assert value.largest == 999_999


@pytest.mark.slow
def test_the_norm_of_a_difference_is_estimated_from_summaries() -> None:
    """For differences at 1000 random positions of several chunks, the estimates are within 30 % of the norms."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        difference = torch.zeros(5_000_000)
        positions = torch.randint(0, 5_000_000, (1000,), generator=generator)
        difference[positions] = torch.randn(1000, generator=generator)
        value = Value.of(difference, full=False)
        assert value.difference_norm(value.exact()) == pytest.approx(float(difference.norm()), rel=0.3)


def test_the_json_file_is_strict_json(tmp_path: Path) -> None:
    """NaN and Inf are strings, because JSON does not have them."""
    write(tmp_path / "a.json", torch.tensor([float("nan")]))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)


def test_nothing_is_published_before_the_recording_is_closed(tmp_path: Path) -> None:
    """Until then, no file has the name of the trace, and an older trace of this name is removed."""
    write(tmp_path / "a.json", torch.ones(1))
    writer = TraceWriter(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    assert not (tmp_path / "a.values").exists()
    writer.put("after", {"w": torch.zeros(1)})
    writer.end_step()
    writer.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "a.values"]


def test_the_parts_of_all_ranks_are_one_trace(tmp_path: Path) -> None:
    """The parts are read from the files of all ranks, in order."""
    for rank in (1, 0):
        write(tmp_path / "a.json", torch.full((1,), float(rank)), rank=rank, world_size=2)
    trace = read_trace(tmp_path / "a.json")
    assert (trace.world_size, trace.dp_size, trace.num_steps, trace.label) == (2, 2, 1, "a test")
    assert [float((rank.steps[0].after or {})["w"].numbers) for rank in trace.ranks] == [0.0, 1.0]


def test_a_missing_rank_is_an_error(tmp_path: Path) -> None:
    """The error names the file and the rank."""
    write(tmp_path / "a.json", torch.ones(1), world_size=2)
    with pytest.raises(TraceError, match=r"trace of 2 ranks, but a\.rank1\.json of rank 1 is missing"):
        read_trace(tmp_path / "a.json")


def test_parts_of_different_lengths_are_an_error(tmp_path: Path) -> None:
    """The error lists the number of steps of each rank."""
    for rank in (0, 1):
        write(tmp_path / "a.json", torch.ones(1), rank=rank, world_size=2, steps=1 + rank)
    with pytest.raises(TraceError, match=r"rank 0: 1, rank 1: 2"):
        read_trace(tmp_path / "a.json")


def test_a_part_of_another_recording_is_an_error(tmp_path: Path) -> None:
    """A part that was written by three ranks does not belong to a trace of two."""
    write(tmp_path / "a.json", torch.ones(1), world_size=2)
    write(tmp_path / "a.json", torch.ones(1), rank=1, world_size=3)
    with pytest.raises(TraceError, match=r"belongs to rank 1 of 3, not to rank 1 of 2"):
        read_trace(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist. Record a trace with stratagem\.trace\.record"),
        ("{", r"cannot be read as a trace"),
        ("[]", r"is not a trace: its format is not 'stratagem-trace'"),
        ('{"format": "stratagem-trace", "version": 99}', r"has version 99 of the trace format"),
        ('{"format": "stratagem-trace", "version": 1}', r"is damaged: it has no rank"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    """The error describes what the file is and what to do."""
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TraceError, match=message):
        read_trace(file)


def test_damaged_numbers_are_an_error(tmp_path: Path) -> None:
    """A changed byte, a missing file and the file of another trace are found."""
    write(tmp_path / "a.json", torch.ones(4))
    numbers = tmp_path / "a.values"
    data = bytearray(numbers.read_bytes())
    data[3] ^= 1
    numbers.write_bytes(data)
    with pytest.raises(
        TraceError, match=r"does not belong to a\.json, or is damaged: it has 16 bytes and should have 16"
    ):
        read_trace(tmp_path / "a.json")
    numbers.unlink()
    with pytest.raises(TraceError, match=r"a\.values, which contains the numbers of a\.json, cannot be read"):
        read_trace(tmp_path / "a.json")


def test_a_value_with_a_wrong_position_is_an_error(tmp_path: Path) -> None:
    """A damaged index is reported as damage of the file instead of an error of torch."""
    file = write(tmp_path / "a.json", torch.ones(4))
    content = json.loads(file.read_text())
    content["values"][0]["offset"] = 400
    file.write_text(json.dumps(content))
    with pytest.raises(TraceError, match=r"a\.json is damaged"):
        read_trace(file)


def test_a_trace_without_steps_is_an_error(tmp_path: Path) -> None:
    """There is nothing to compare, probably because another model was recorded."""
    file = TraceWriter(tmp_path / "a.json").close()
    with pytest.raises(TraceError, match=r"contains no step"):
        read_trace(file)
