"""Traces of Lightning, Accelerate and transformers equal that of a hand-written loop, and faults are found in the right part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stratagem.trace import Part, Tolerances, compare, read_trace
from tests.foreign import trace_loops
from tests.foreign.trace_loops import LIBRARIES, by_hand
from tests.support.ranks import scripts_environment

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.timeout(900),
    # Deprecated functions that these libraries call.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_trace_of_a_library_has_the_same_bits_as_that_of_a_hand_written_loop(library: str, tmp_path: Path) -> None:
    """All values are recorded: samples, losses, gradients, norms, learning rates, parameters and buffers."""
    by_hand(tmp_path / "hand.json")
    LIBRARIES[library](tmp_path / "library.json")
    trace = read_trace(tmp_path / "library.json")
    result = compare(read_trace(tmp_path / "hand.json"), trace)
    assert result.largest is None
    assert result.not_compared == ()
    assert set(result.sizes) == set(Part) - {Part.AVERAGE}
    assert [step.absent for step in trace.ranks[0].steps] == [{}] * 4


@pytest.mark.parametrize("library", LIBRARIES)
def test_recording_a_library_does_not_change_the_training(library: str, tmp_path: Path) -> None:
    """With and without a recording, all bits of the model are equal."""
    plain, recorded = LIBRARIES[library](None), LIBRARIES[library](tmp_path / "a.json")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, recorded.state_dict()[name]), name


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("part", "options"), [(Part.CLIP, {"clip": 0.2}), (Part.SCHEDULE, {"lr": 0.2})])
def test_another_option_of_a_library_is_found_in_its_part(
    library: str, part: Part, options: dict[str, float], tmp_path: Path
) -> None:
    """Another limit of the gradient norm is a difference of the clipping, another learning rate one of the schedule."""
    by_hand(tmp_path / "hand.json")
    LIBRARIES[library](tmp_path / "library.json", **options)
    first = compare(read_trace(tmp_path / "hand.json"), read_trace(tmp_path / "library.json")).first
    assert first is not None
    assert (first.step, first.part) == (1, part)


def test_libraries_on_two_ranks_differ_from_one_process_only_by_rounding(tmp_path: Path) -> None:
    """Each library trains the same samples; a missing reduction of the gradients is found in the reduction."""
    script = [str(Path(trace_loops.__file__)), str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    done = subprocess.run(launch, env=scripts_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_hand(tmp_path / "hand.json")
    reference = read_trace(tmp_path / "hand.json")
    for library in LIBRARIES:
        trace = read_trace(tmp_path / f"{library}.json")
        assert trace.world_size == 2
        result = compare(reference, trace, Tolerances(relative=1e-5))
        assert result.first is None, (library, result.first)
        assert result.not_compared == ()
        first, second = ((rank.steps[0].local or {}) for rank in trace.ranks)
        assert all(value.digest != second[name].digest for name, value in first.items()), library
    first_difference = compare(reference, read_trace(tmp_path / "not_reduced.json"), Tolerances(relative=1e-5)).first
    assert first_difference is not None
    assert (first_difference.step, first_difference.part) == (1, Part.REDUCTION)
