"""Compare two traces with the command, and derive what counts as rounding from a reference in float64."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.cli.parity.comparing import compare_variants
from stratagem.cli.parity.picture import picture_of
from stratagem.cli.parity.report import BatchDependence, Verdict, verdict_of
from stratagem.cli.parity.tolerances import (
    CAPS,
    FACTOR,
    StepTolerances,
    constant_tolerances,
    noise_of,
    tolerances_of,
)
from stratagem.cli.parity.variants import NoiseSource, Variant
from stratagem.trace import Comparison, Difference, Group, Part, TraceWriter, read_trace

Command = Callable[..., Any]


def write(path: Path, *, factor: float = 1.0, samples: str = "sample", lr: float = 0.1, dtype: Any = None) -> Path:
    """Write a trace of two steps with a single parameter; the factor multiplies the gradient of the second step."""
    writer = TraceWriter(path)
    weight = torch.tensor([1.0, 2.0], dtype=dtype)
    for step in (1, 2):
        gradient = torch.tensor([0.25, 0.5], dtype=dtype) * (factor if step == 2 else 1.0)
        writer.add_samples([f"{samples} {step}"])
        writer.set_loss(2.0)
        writer.add_groups([Group(parameters=("w",), options={"lr": lr})])
        writer.put("before", {"w": weight})
        for section in ("local", "reduced", "clipped"):
            writer.put(section, {"w": gradient})
        weight = weight - lr * gradient
        writer.put("after", {"w": weight})
        writer.put("buffers", {})
        writer.end_step()
    writer.close()
    return path


@pytest.mark.slow
def test_equal_traces_have_exit_code_0(stratagem: Command, tmp_path: Path):
    """Two traces of the same numbers are bitwise identical."""
    done = stratagem("parity", write(tmp_path / "a.json"), write(tmp_path / "b.json"))
    assert done.status == 0, done.out
    assert "bitwise identical" in done.out


@pytest.mark.slow
def test_traces_with_rounding_are_equal_within_the_tolerance(stratagem: Command, tmp_path: Path):
    """A relative difference of 1e-5 is rounding by default, and a difference with --tolerance 1e-6."""
    files = write(tmp_path / "a.json"), write(tmp_path / "b.json", factor=1 + 1e-5)
    assert stratagem("parity", *files).status == 0
    done = stratagem("parity", *files, "--tolerance", "1e-6", "--json")
    assert done.status == 1
    other = json.loads(done.out)["variants"][1]
    assert (other["part"], other["first"]["name"], other["first"]["step"]) == ("backward", "w", 2)
    assert other["first"]["relative"] == pytest.approx(1e-5, rel=0.01)
    assert [each["tolerance"] for each in other["by_step"]] == [0.0, 1e-6]


@pytest.mark.slow
def test_the_first_difference_of_two_traces_is_shown_with_its_part(stratagem: Command, tmp_path: Path):
    """The table has the step, the part and the size of the first difference, and the factor between the tensors."""
    done = stratagem("parity", write(tmp_path / "a.json"), write(tmp_path / "b.json", factor=2.0))
    assert done.status == 1
    assert "step 2, rank 0: gradient w 1.0e+00 (2 times the value in the first trace)" in done.out
    assert "backward" in done.out


@pytest.mark.slow
def test_a_learning_rate_of_0_is_found_in_a_trace(stratagem: Command, tmp_path: Path):
    """If nothing moves in a trace, this is wrong by itself, although the other trace is equal."""
    done = stratagem("parity", write(tmp_path / "a.json", lr=0.0), write(tmp_path / "b.json", lr=0.0))
    assert done.status == 1
    assert "WRONG, schedule: a.json: no parameter moved in 2 steps" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a.json", "none.json"), "none.json does not exist"),
        (("a.json", "text.json"), "text.json cannot be read as a trace"),
        (("a.json", "other.py"), "other.py is not a trace"),
        (("a.json", "a.json", "a.json"), "got 3 files"),
    ],
)
def test_files_that_are_not_traces_have_exit_code_2(
    stratagem: Command, tmp_path: Path, names: tuple[str, ...], text: str
):
    """A missing file, a file with other contents, and a wrong number of files are errors that name the file."""
    write(tmp_path / "a.json")
    (tmp_path / "text.json").write_text("no trace")
    done = stratagem("parity", *(tmp_path / name for name in names))
    assert done.status == 2
    assert text in done.err


# Tolerances.


def difference(step: int, relative: float, name: str = "w", part: Part = Part.BACKWARD) -> Difference:
    """Return a difference with a relative size."""
    return Difference(
        step=step, part=part, name=name, rank=None, size=relative, relative=relative, typical=relative, kind="gradient"
    )


def tolerances(*differences: Difference, steps: int = 2, dtype: str = "float32") -> StepTolerances:
    """Return the tolerances for a reference with these differences from float64."""
    by_step = [[each for each in differences if each.step == step] for step in range(1, steps + 1)]
    return tolerances_of(noise_of(by_step), dtype)


def test_the_tolerance_is_a_multiple_of_the_rounding_error_up_to_the_step():
    """A difference may be 10 times the rounding error of the tensor; errors of later steps do not count."""
    found = tolerances(difference(1, 1e-6), difference(2, 3e-6))
    assert found.of(Part.BACKWARD, "w", 1) == pytest.approx(FACTOR * 1e-6)
    assert found.of(Part.BACKWARD, "w", 2) == pytest.approx(FACTOR * 3e-6)
    kept = tolerances(difference(1, 1e-6), difference(2, 1e-7))
    assert kept.of(Part.BACKWARD, "w", 2) == pytest.approx(FACTOR * 1e-6)


def test_a_tensor_without_rounding_error_has_that_of_a_typical_one():
    """The tolerance of a tensor that happens to be exact follows from the median of the part of the step."""
    found = tolerances(*(difference(1, size, name) for name, size in (("a", 1e-6), ("b", 2e-6), ("c", 3e-6))), steps=1)
    assert found.of(Part.BACKWARD, "exact", 1) == pytest.approx(FACTOR * 2e-6)
    assert found.of(Part.BACKWARD, "a", 1) == pytest.approx(FACTOR * 2e-6)
    assert found.of(Part.BACKWARD, "c", 1) == pytest.approx(FACTOR * 3e-6)


def test_tolerances_are_capped_by_dtype():
    """No tolerance exceeds the cap of its dtype, and bfloat16 permits more than float32."""
    assert tolerances(difference(1, 0.9e-3)).of(Part.BACKWARD, "w", 1) == CAPS["float32"]
    assert tolerances(difference(1, 0.05), dtype="bfloat16").of(Part.BACKWARD, "w", 1) == CAPS["bfloat16"]


def test_a_tensor_of_rounding_errors_is_not_compared_and_listed():
    """If the rounding error alone exceeds the cap, any difference is permitted, and the name is listed."""
    found = tolerances(difference(2, 0.5, "key.bias"))
    assert found.of(Part.BACKWARD, "key.bias", 1) == math.inf
    assert found.hidden() == ["key.bias (backward)"]


def test_a_tenth_of_the_elements_may_move_in_the_other_direction():
    """With Adam, the rounding error of a small gradient decides its sign, so few elements differ by twice their movement."""
    noise = noise_of([[difference(1, 1e-6, part=Part.UPDATE)]])
    found = tolerances_of(noise, "float32", {"w": (0.01,)})

    def allowed(size: float, typical: float, part: Part = Part.UPDATE) -> bool:
        return found.first_exceeding([replace(difference(1, size, part=part), typical=typical)]) is None

    assert allowed(0.02, 1e-6)
    assert not allowed(0.03, 1e-6)
    assert not allowed(0.02, 1e-3)
    assert not allowed(0.02, 1e-6, part=Part.CLIP)
    few = replace(difference(1, 0.02, part=Part.UPDATE), typical=0.0)
    assert constant_tolerances(0.0, "").first_exceeding([few]) is few


def test_the_tolerances_grow_after_an_element_moved_in_the_other_direction():
    """If few elements of a parameter differ by 4 times the tolerance, the gradients of the step may differ 4 times as much."""
    noise = noise_of([[difference(1, 1e-5, part=Part.START), difference(1, 1e-5)]])
    found = tolerances_of(noise, "float32", {"w": (0.01,)})
    few = replace(difference(1, 4e-4, part=Part.START), typical=0.0)
    assert found.first_exceeding([few, difference(1, 3.9e-4)]) is None
    assert found.first_exceeding([difference(1, 3.9e-4)]) is not None
    assert found.first_exceeding([few, difference(1, 4.1e-4)]) is not None


def test_samples_and_learning_rates_have_no_rounding_error():
    """Data must be equal, and learning rates equal to the precision of Python's numbers."""
    found = tolerances(difference(1, 1e-3))
    assert found.of(Part.DATA, "samples", 1) == 0.0
    assert found.of(Part.SCHEDULE, "lr of w", 1) == 1e-12


def test_the_larger_one_of_two_rounding_errors_sets_the_tolerance(tmp_path: Path):
    """If a run with differently rounded gradients is farther away than one in float64, its distance is the rounding error."""
    traces = {
        key: read_trace(write(tmp_path / f"{key}.json", factor=factor))
        for key, factor in (("one", 1.0), ("float64", 1 + 1e-6), ("rounded", 1 + 1e-5), ("other", 1 + 5e-5))
    }
    listed = [
        Variant(key="one", name="one"),
        Variant(key="float64", name="float64", against="one", exact=False, noise=NoiseSource.FLOAT64),
        Variant(key="rounded", name="rounded", against="one", exact=False, noise=NoiseSource.ROUNDED),
        Variant(key="other", name="other", against="one", exact=False),
    ]
    assert compare_variants("four traces", listed, traces).results[-1].verdict is Verdict.EQUAL


def test_the_reference_in_float64_sets_the_tolerance(tmp_path: Path):
    """A variant is equal if it differs from the reference by less than 10 times the distance of the reference from float64."""

    def verdict(factor: float) -> Verdict:
        traces = {
            "one": read_trace(write(tmp_path / "one.json")),
            "double": read_trace(write(tmp_path / "double.json", factor=1 + 1e-5, dtype=torch.float64)),
            "other": read_trace(write(tmp_path / "other.json", factor=factor)),
        }
        listed = [
            Variant(key="one", name="one"),
            Variant(key="double", name="double", against="one", exact=False, noise=NoiseSource.FLOAT64),
            Variant(key="other", name="other", against="one", exact=False),
        ]
        return compare_variants("three traces", listed, traces).results[-1].verdict

    assert verdict(1 + 5e-5) is Verdict.EQUAL
    assert verdict(1 + 5e-4) is Verdict.DIFFERENT


# Verdicts and the picture.


def comparison(part: Part) -> Comparison:
    """Return a comparison whose first difference is in a part."""
    first = difference(1, 0.5, part=part)
    return Comparison(first=first, largest=first, sizes={}, num_steps=1)


def test_dropout_explains_only_differences_after_the_data():
    """Dropout explains a difference of a split batch from the forward pass on, but neither other samples nor a resumed run."""
    split, resumed = Variant(key="a", name="a", exact=False), Variant(key="b", name="b", exact=True)
    dropout = BatchDependence(uses_rng=True)
    assert verdict_of(split, comparison(Part.FORWARD), dropout) is Verdict.NOT_COMPARABLE
    assert verdict_of(split, comparison(Part.DATA), dropout) is Verdict.DIFFERENT
    assert verdict_of(resumed, comparison(Part.FORWARD), dropout) is Verdict.DIFFERENT
    assert verdict_of(split, comparison(Part.FORWARD), BatchDependence()) is Verdict.DIFFERENT


def test_the_picture_shows_the_difference_relative_to_its_tolerance(tmp_path: Path):
    """The line of a variant crosses the limit of 1 in the step in which the difference exceeds the tolerance."""
    traces = {
        key: read_trace(write(tmp_path / f"{key}.json", factor=factor)) for key, factor in (("a", 1.0), ("b", 1.01))
    }
    listed = [Variant(key="a", name="a"), Variant(key="b", name="b", against="a", exact=False)]
    chart = picture_of(compare_variants("two traces", listed, traces, tolerance=1e-3))
    assert chart is not None
    limit, line = chart.panels[0].lines
    assert list(limit.y) == [1.0, 1.0]
    # No difference in the first step is drawn at the bottom; 0.01 is 10 times the tolerance.
    assert line.y[0] < 1.0
    assert line.y[1] == pytest.approx(10.0, rel=1e-3)
