"""Records as JSON lines."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratagem.errors import WorkDirError
from stratagem.logging import JsonLinesWriter
from stratagem.logging.jsonlines import _plain


def lines(path: Path) -> list[Any]:
    """Parse each line as strict JSON, which does not allow NaN."""

    def reject(name: str) -> None:
        raise AssertionError(f"{name} is not valid JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text("ascii").splitlines()]


def written(tmp_path: Path, value: Any) -> Any:
    """Write a value and return the parsed result."""
    with JsonLinesWriter(tmp_path / "values.jsonl") as writer:
        writer.write({"value": value})
    return lines(tmp_path / "values.jsonl")[-1]["value"]


def test_each_record_is_one_line(tmp_path: Path) -> None:
    """Records are appended to the existing file, one per line."""
    for step in (1, 2):
        with JsonLinesWriter(tmp_path / "log.jsonl") as writer:
            writer.write({"step": step, "loss": 0.5, "note": "a\nb é"})
    assert lines(tmp_path / "log.jsonl") == [{"step": step, "loss": 0.5, "note": "a\nb é"} for step in (1, 2)]


def test_a_record_can_be_read_immediately(tmp_path: Path) -> None:
    """Each record is flushed, so it can be read during the run and is not lost if the process is killed."""
    writer = JsonLinesWriter(tmp_path / "log.jsonl")
    writer.write({"step": 1})
    assert lines(tmp_path / "log.jsonl") == [{"step": 1}]
    writer.close()


def test_an_incomplete_line_does_not_affect_later_ones(tmp_path: Path) -> None:
    """After an incomplete line from a killed process, the next run starts a new line."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"st')
    with JsonLinesWriter(file) as writer:
        writer.write({"step": 2})
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "NaN"), (float("inf"), "Infinity"), (-float("inf"), "-Infinity")]
)
def test_nan_and_infinity_are_written_as_strings(tmp_path: Path, value: float, text: str) -> None:
    """NaN and infinity are written as strings that ``float()`` can parse, including those in tensors."""
    assert written(tmp_path, value) == text
    assert written(tmp_path, torch.tensor([1.0, value])) == [1.0, text]
    assert repr(float(text)) == repr(value)


class Color(enum.IntEnum):
    RED = 1


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (torch.tensor(2), 2),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (np.float32(0.25), 0.25),
        (np.arange(3), [0, 1, 2]),
        (np.bool_(True), True),
        ((1, (2, None)), [1, [2, None]]),
        ({3}, [3]),
        ({1: {None: True}}, {"1": {"None": True}}),
        (Color.RED, 1),
        (Path("a/b"), "a/b"),
        (b"\xff", "b'\\xff'"),
        (1 + 2j, "(1+2j)"),
        (2**5000, hex(2**5000)),
        ("\ud800", "\ud800"),
    ],
)
def test_unusual_values_are_converted(tmp_path: Path, value: Any, read: Any) -> None:
    """Tensors, arrays and their elements become numbers; values without a JSON equivalent become strings."""
    assert written(tmp_path, value) == read


def test_a_value_that_cannot_be_printed_is_replaced(tmp_path: Path) -> None:
    """A value whose methods all raise is written as a placeholder."""
    assert written(tmp_path, Unprintable()) == "<Unprintable that cannot be printed>"


def test_a_meta_tensor_is_written_as_its_description(tmp_path: Path) -> None:
    """A meta tensor has no values, so its description is written."""
    assert "meta" in written(tmp_path, torch.zeros(2, device="meta"))


def test_circular_references_are_handled(tmp_path: Path) -> None:
    """Circular references are written as strings."""
    value: list[Any] = [1]
    value += [value, value]
    assert written(tmp_path, value) == [1, "[1, [...], [...]]", "[1, [...], [...]]"]


def test_deep_nesting_is_limited(tmp_path: Path) -> None:
    """Values nested deeper than 20 levels are written as strings."""
    value: Any = 1
    for _ in range(50):
        value = [value]
    read, depth = written(tmp_path, value), 0
    while isinstance(read, list):
        read, depth = read[0], depth + 1
    assert depth < 20
    assert read.startswith("[[[")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary() | st.complex_numbers(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.floats(), inner) | st.tuples(inner)
        ),
    )
)
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_every_value_becomes_valid_json(value: Any) -> None:
    """Every value that a model may return becomes strict JSON."""
    json.loads(json.dumps(_plain(value), allow_nan=False))


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    """The error for a file that cannot be opened contains the path and the reason."""
    with pytest.raises(WorkDirError, match=r"absent/log\.jsonl: cannot be opened for writing \(No such file"):
        JsonLinesWriter(tmp_path / "absent" / "log.jsonl")


def test_close_is_idempotent(tmp_path: Path) -> None:
    """``close()`` is idempotent."""
    writer = JsonLinesWriter(tmp_path / "log.jsonl")
    writer.close()
    writer.close()


def test_a_released_file_is_closed_until_the_next_record(tmp_path: Path) -> None:
    """release_file() closes the file, the next record opens it again and is appended, and close() is final."""
    writer = JsonLinesWriter(tmp_path / "log.jsonl")
    writer.write({"step": 1})
    writer.release_file()
    assert writer._file.closed
    writer.write({"step": 2})
    assert lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]
    writer.close()
    writer.release_file()
    with pytest.raises(ValueError, match="closed file"):
        writer.write({"step": 3})
