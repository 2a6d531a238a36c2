"""Comparing two training runs finds the first step and parameter that differ, and the size of the difference."""

import math
from pathlib import Path

import pytest
import torch

from stratagem.checkpoint import save_checkpoint
from stratagem.errors import TrainingError
from stratagem.train.tools.trace_comparison import StepDifference, compare_traces


def write(folder: Path, steps: list[tuple[float, list[float], list[float]]]) -> Path:
    """Save the loss and two parameters after each step in the recorder's format."""
    for number, (loss, a, b) in enumerate(steps):
        state = {"a": torch.tensor(a), "b": torch.tensor(b)}
        save_checkpoint({"loss": loss, "state": state}, folder / f"step_{number}.pth")
    return folder


START = (math.nan, [1.0, 2.0], [4.0])


def test_equal_runs_have_no_difference(tmp_path: Path):
    """NaN values at the same place count as equal."""
    steps = [START, (0.5, [1.0, math.nan], [3.0])]
    found = compare_traces(write(tmp_path / "one", steps), write(tmp_path / "other", steps), 1)
    assert found.first is None
    assert found.most is None


def test_the_first_and_the_largest_difference_are_reported(tmp_path: Path):
    """At step 1 ``b`` differs by 0.5 of 2; at step 2 ``a`` differs by 1 of 2 and the loss by less."""
    one = write(tmp_path / "one", [START, (0.5, [1.0, 2.0], [2.0]), (0.25, [1.0, 2.0], [2.0])])
    other = write(tmp_path / "other", [START, (0.5, [1.0, 2.0], [1.5]), (0.3125, [1.0, 1.0], [2.0])])
    found = compare_traces(one, other, 2)
    assert found.first == StepDifference(1, "b", 0.5, 0.25)
    assert found.most == StepDifference(2, "a", 1.0, 0.5)
    assert found.most.describe() == "step 2: a differs by 1.0e+00 (relative 5.0e-01)"


def test_a_number_and_nan_differ_by_the_maximum(tmp_path: Path):
    """The difference between a number and NaN is larger than any other."""
    one = write(tmp_path / "one", [START, (0.5, [1.0, 2.0], [2.0])])
    other = write(tmp_path / "other", [START, (math.nan, [1.0, 2.0], [2.0])])
    found = compare_traces(one, other, 1)
    assert found.first is not None
    assert found.first.name == "the loss"
    assert found.first.size > 1e300


def test_a_run_that_ended_earlier_is_an_error(tmp_path: Path):
    """The error names the missing step."""
    one = write(tmp_path / "one", [START, START])
    other = write(tmp_path / "other", [START])
    with pytest.raises(TrainingError, match="'other' ended before step 1"):
        compare_traces(one, other, 1)
