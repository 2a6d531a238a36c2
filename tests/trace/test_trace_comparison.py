"""Compare traces that are written by hand: a fault in each part of a step is attributed to this part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem.trace import Comparison, Group, Part, Tolerances, TraceWriter, compare, read_trace

Change = Callable[[dict[str, Any]], object]


def values(step: int, rank: int, world_size: int) -> dict[str, Any]:
    """Return what a rank records in a step of a training with the parameters ``w`` and ``b``."""
    local = {"w": torch.tensor([1.0, 2.0]) * (rank + 1), "b": torch.tensor([0.5])}
    reduced = {"w": torch.tensor([1.0, 2.0]) * (world_size + 1) / 2, "b": torch.tensor([0.5])}
    before = {"w": torch.tensor([3.0, 4.0]) / step, "b": torch.tensor([1.0]) / step}
    return {
        "samples": [f"sample {step} {rank}"],
        "loss": 2.0 * (rank + 1),
        "weight": 1.0,
        "generator": "state",
        "draws": False,
        "grad_norm": 1.5,
        "lr": 0.1,
        "before": before,
        "local": local,
        "buffers": {"mean": torch.tensor([0.25])},
        "reduced": reduced,
        "clipped": {name: each / 2 for name, each in reduced.items()},
        "after": {name: each - 0.05 * reduced[name] for name, each in before.items()},
        "averaged": {name: each * 0.9 for name, each in before.items()},
    }


def write(path: Path, *, world_size: int = 1, changes: Mapping[tuple[int, int], Change] | None = None) -> Path:
    """Write a trace of two steps; ``changes`` change the values of a step and a rank before they are written."""
    for rank in range(world_size):
        writer = TraceWriter(path, rank=rank, world_size=world_size)
        for step in (1, 2):
            found = values(step, rank, world_size)
            (changes or {}).get((step, rank), lambda _: None)(found)
            write_step(writer, found)
        writer.close()
    return path


def write_step(writer: TraceWriter, found: Mapping[str, Any]) -> None:
    """Write one step."""
    if found["samples"] is not None:
        writer.add_samples(found["samples"])
    if found["loss"] is not None:
        writer.set_loss(found["loss"], found["weight"])
    writer.set_generator(found["generator"], draws=found["draws"])
    writer.set_grad_norm(found["grad_norm"])
    if found["lr"] is not None:
        writer.add_groups([Group(parameters=found.get("names", ("w", "b")), options={"lr": found["lr"]})])
    for section in ("before", "local", "buffers", "reduced", "clipped", "after", "averaged"):
        if found[section] is None:
            writer.set_absent(section, "the engine hides it")
        else:
            writer.put(section, found[section])
    writer.end_step()


def compared(
    folder: Path,
    change: Change,
    *,
    step: int = 2,
    rank: int = 0,
    world_size: int = 1,
    tolerances: Tolerances | None = None,
) -> Comparison:
    """Compare a trace with a changed copy of it."""
    a = write(folder / "a.json", world_size=world_size)
    b = write(folder / "b.json", world_size=world_size, changes={(step, rank): change})
    return compare(read_trace(a), read_trace(b), tolerances)


def changed(section: str, name: str, factor: float = 2.0) -> Change:
    """Return a change that multiplies a tensor."""

    def change(found: dict[str, Any]) -> None:
        found[section] = {**found[section], name: found[section][name] * factor}

    return change


def everything_after(part: Part) -> Change:
    """Return a change of a part and of everything that is computed from it."""
    sections = ["before", "local", "reduced", "clipped", "after", "averaged"]
    order = [Part.START, Part.BACKWARD, Part.REDUCTION, Part.CLIP, Part.UPDATE, Part.AVERAGE]
    position = {Part.DATA: 0, Part.FORWARD: 0, Part.SCHEDULE: 3}

    def change(found: dict[str, Any]) -> None:
        begin = position.get(part, order.index(part) if part in order else 0)
        if part is Part.DATA:
            found["samples"] = ["another sample"]
        if part in (Part.START, Part.DATA, Part.FORWARD):
            found["loss"] *= 3
        if part is Part.SCHEDULE:
            found["lr"] *= 2
        for section in sections[begin if part in order else begin + 1 :]:
            changed(section, "w")(found)

    return change


def test_equal_traces_have_no_difference(tmp_path: Path) -> None:
    """A trace equals a second recording of the same values, in all parts."""
    result = compared(tmp_path, lambda _: None)
    assert result.equal
    assert result.largest is None
    assert result.num_steps == 2
    assert set(result.sizes) == set(Part)
    assert result.not_compared == ()


@pytest.mark.parametrize("part", list(Part))
def test_a_fault_is_attributed_to_its_part_although_all_later_parts_differ(tmp_path: Path, part: Part) -> None:
    """If a part and everything computed from it differ, the part itself is reported, in the step of the fault."""
    first = compared(tmp_path, everything_after(part)).first
    assert first is not None
    assert (first.step, first.part, first.also_possible) == (2, part, ())


def test_the_size_of_a_difference_is_relative_to_the_largest_value_of_the_tensor(tmp_path: Path) -> None:
    """The reduced gradient [1, 2] is doubled: the largest difference is 2, and 1 relative to the largest value."""
    first = compared(tmp_path, changed("reduced", "w")).first
    assert first is not None
    assert (first.name, first.rank, first.size, first.relative) == ("w", 0, 2.0, 1.0)
    assert first.note == "2 times the value in the first trace"
    assert first.describe() == (
        "step 2, reduction: gradient w on rank 0 differs by 2.0e+00 (relative 1.0e+00); 2 times the value in the first trace"
    )


def test_the_rank_with_a_difference_is_named(tmp_path: Path) -> None:
    """With equal numbers of ranks, values are compared rank by rank."""
    first = compared(tmp_path, changed("clipped", "b"), rank=1, world_size=2).first
    assert first is not None
    assert (first.part, first.name, first.rank) == (Part.CLIP, "b", 1)


def test_one_process_equals_two_ranks_whose_mean_is_the_same(tmp_path: Path) -> None:
    """Samples are compared as the union over ranks, losses and local gradients as the mean."""

    def combine(found: dict[str, Any]) -> None:
        found["samples"] = [found["samples"][0], found["samples"][0].replace(" 0", " 1")]
        found["loss"] = 3.0
        found["local"] = {"w": torch.tensor([1.5, 3.0]), "b": torch.tensor([0.5])}
        for section in ("reduced", "clipped", "after"):
            found[section] = values(int(found["samples"][0].split()[1]), 0, 2)[section]

    one = write(tmp_path / "one.json", changes={(1, 0): combine, (2, 0): combine})
    two = write(tmp_path / "two.json", world_size=2)
    assert compare(read_trace(one), read_trace(two)).first is None
    assert compare(read_trace(two), read_trace(one)).first is None


def test_the_mean_over_ranks_is_weighted(tmp_path: Path) -> None:
    """Ranks with 1 and 3 tokens: the loss of all tokens is (2 * 1 + 4 * 3) / 4 = 3.5."""

    def weigh(found: dict[str, Any]) -> None:
        found["weight"] = {2.0: 1.0, 4.0: 3.0}[found["loss"]]

    two = write(
        tmp_path / "two.json", world_size=2, changes={(step, rank): weigh for step in (1, 2) for rank in (0, 1)}
    )
    one = write(
        tmp_path / "one.json", changes={(1, 0): lambda found: found.update(samples=["sample 1 0", "sample 1 1"])}
    )
    first = compare(read_trace(one), read_trace(two)).first
    assert first is not None
    assert (first.part, first.name, first.size) == (Part.FORWARD, "loss", 1.5)


def test_a_rank_with_the_data_of_another_rank_is_a_difference_of_the_data(tmp_path: Path) -> None:
    """The repeated sample is reported with the rank that has it."""
    first = compared(tmp_path, lambda found: found.update(samples=["sample 2 0"]), rank=1, world_size=2).first
    assert first is not None
    assert (first.part, first.kind, first.size, first.relative) == (Part.DATA, "samples", 1, 0.5)
    assert first.note == "2 samples in the first trace, 2 in the second, of which 1 are repeated"


def test_different_samples_are_reported_whatever_the_tolerance(tmp_path: Path) -> None:
    """Rounding cannot explain a different sample."""
    result = compared(tmp_path, lambda found: found.update(samples=["other"]), tolerances=Tolerances(relative=10.0))
    assert result.first is not None
    assert result.first.part is Part.DATA


def test_a_difference_within_the_tolerance_is_only_the_largest_one(tmp_path: Path) -> None:
    """A relative difference of 1e-6 is equal with a tolerance of 1e-5, and different with one of 1e-7."""
    small = changed("after", "w", 1 + 1e-6)
    result = compared(tmp_path, small, tolerances=Tolerances(relative=1e-5))
    assert result.equal
    assert result.largest is not None
    assert result.largest.relative == pytest.approx(1e-6, rel=0.2)
    assert result.sizes[Part.UPDATE] == (0.0, result.largest.relative)
    assert not compared(tmp_path, small, tolerances=Tolerances(relative=1e-5, by_part={Part.UPDATE: 1e-7})).equal


def test_a_gradient_of_rounding_errors_is_compared_with_the_largest_gradient(tmp_path: Path) -> None:
    """With a floor of 1e-3, a change of b from 0.5e-9 to 1e-9 is small compared with 1e-3 times the largest gradient, 2."""

    def tiny(factor: float) -> Change:
        return lambda found: found.update(local={**found["local"], "b": torch.tensor([0.5e-9 * factor])})

    a = write(tmp_path / "a.json", changes={(2, 0): tiny(1.0)})
    b = write(tmp_path / "b.json", changes={(2, 0): tiny(2.0)})
    pair = read_trace(a), read_trace(b)
    assert not compare(*pair, Tolerances(relative=1e-6)).equal
    assert compare(*pair, Tolerances(relative=1e-6, floor=1e-3)).equal


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_inf_in_one_trace_exceed_every_tolerance(tmp_path: Path, number: float) -> None:
    """A NaN or Inf in only one trace is an infinite difference."""
    result = compared(tmp_path, changed("local", "w", number), tolerances=Tolerances(relative=1e9))
    assert result.first is not None
    assert (result.first.part, result.first.size) == (Part.BACKWARD, math.inf)


def test_a_nan_loss_is_a_difference(tmp_path: Path) -> None:
    """The loss is NaN in the second trace only."""
    first = compared(tmp_path, lambda found: found.update(loss=math.nan), tolerances=Tolerances(relative=1e9)).first
    assert first is not None
    assert first.part is Part.FORWARD


def test_nan_in_both_traces_is_equal(tmp_path: Path) -> None:
    """The same NaN in both traces is not a difference."""
    nan = {(2, 0): changed("local", "w", math.nan)}
    a, b = write(tmp_path / "a.json", changes=nan), write(tmp_path / "b.json", changes=nan)
    assert compare(read_trace(a), read_trace(b)).equal


def test_a_frozen_parameter_is_a_difference_of_the_backward_pass(tmp_path: Path) -> None:
    """A gradient that only one trace has is absent in the other, unless it is zero."""
    first = compared(tmp_path, lambda found: found.update(local={"w": found["local"]["w"]})).first
    assert first is not None
    assert (first.part, first.name, first.note) == (Part.BACKWARD, "b", "absent in the second trace")
    zero = {(2, 0): changed("local", "b", 0.0)}
    missing = {(2, 0): lambda found: found.update(local={"w": found["local"]["w"]})}
    a, b = write(tmp_path / "a.json", changes=zero), write(tmp_path / "b.json", changes=missing)
    assert compare(read_trace(a), read_trace(b)).equal


def test_hidden_values_widen_the_parts_in_which_a_difference_may_arise(tmp_path: Path) -> None:
    """Without local gradients, a difference of reduced gradients arises in the backward pass or the reduction."""
    hide = {(step, 0): lambda found: found.update(local=None) for step in (1, 2)}

    def hide_and_change(found: dict[str, Any]) -> None:
        changed("reduced", "w")(found)
        found["local"] = None

    a = write(tmp_path / "a.json", changes=hide)
    b = write(tmp_path / "b.json", changes={**hide, (2, 0): hide_and_change})
    result = compare(read_trace(a), read_trace(b))
    assert result.first is not None
    assert (result.first.part, result.first.also_possible) == (Part.REDUCTION, (Part.BACKWARD,))
    assert Part.BACKWARD not in result.sizes
    assert result.not_compared == ("local gradients: the engine hides it",)


def test_without_samples_and_losses_a_difference_of_gradients_may_arise_in_the_data(tmp_path: Path) -> None:
    """The data and the forward pass are possible as well."""
    hidden = {"samples": None, "loss": None}

    def hide_and_change(found: dict[str, Any]) -> None:
        changed("local", "w")(found)
        found.update(hidden)

    a = write(tmp_path / "a.json", changes={(step, 0): lambda found: found.update(hidden) for step in (1, 2)})
    b = write(tmp_path / "b.json", changes={(1, 0): hide_and_change, (2, 0): lambda found: found.update(hidden)})
    first = compare(read_trace(a), read_trace(b)).first
    assert first is not None
    assert (first.part, first.also_possible) == (Part.BACKWARD, (Part.DATA, Part.FORWARD))


def test_another_generator_state_is_a_difference_only_if_the_forward_pass_draws(tmp_path: Path) -> None:
    """The state of the generators matters only for layers such as dropout."""
    assert compared(tmp_path, lambda found: found.update(generator="other")).equal
    first = compared(tmp_path, lambda found: found.update(generator="other", draws=True)).first
    assert first is not None
    assert (first.part, first.kind) == (Part.FORWARD, "generator")


def test_buffers_that_differ_between_ranks_are_not_compared_with_one_process(tmp_path: Path) -> None:
    """Running statistics depend on the samples of each rank, and the comparison reports that it skipped them."""
    one = write(tmp_path / "one.json")
    two = write(tmp_path / "two.json", world_size=2, changes={(1, 1): changed("buffers", "mean")})
    result = compare(read_trace(one), read_trace(two))
    assert "buffers that differ between ranks: mean" in result.not_compared


def test_a_longer_trace_is_compared_up_to_the_end_of_the_shorter_one(tmp_path: Path) -> None:
    """The steps that only one trace has are reported as not compared."""
    short = TraceWriter(tmp_path / "short.json")
    write_step(short, values(1, 0, 1))
    result = compare(read_trace(write(tmp_path / "long.json")), read_trace(short.close()))
    assert result.equal
    assert result.num_steps == 1
    assert result.not_compared == ("steps 2 to 2, which only one trace has",)


@pytest.mark.parametrize("nested", ["one", "other"])
def test_a_prefix_of_all_names_is_ignored(tmp_path: Path, nested: str) -> None:
    """The same model as an attribute of another module has the same values under longer names."""

    def nest(found: dict[str, Any]) -> None:
        for section in ("before", "local", "buffers", "reduced", "clipped", "after", "averaged"):
            found[section] = {f"net.inner.{name}": value for name, value in found[section].items()}
        found["names"] = ("net.inner.w", "net.inner.b")

    files = {
        "one": write(tmp_path / "one.json", changes={(1, 0): nest, (2, 0): nest} if nested == "one" else None),
        "other": write(tmp_path / "other.json", changes={(1, 0): nest, (2, 0): nest} if nested == "other" else None),
    }
    result = compare(read_trace(files["one"]), read_trace(files["other"]))
    assert result.largest is None
    assert Part.SCHEDULE in result.sizes


def summarized(folder: Path, name: str, tensor: Tensor, *, full: bool = False) -> Path:
    """Write a trace with one large tensor."""
    writer = TraceWriter(folder / name, full=full)
    write_step(writer, {**values(1, 0, 1), "after": {"w": tensor, "b": torch.zeros(1)}})
    return writer.close()


@pytest.mark.slow
def test_the_difference_of_a_single_element_of_a_large_tensor_is_found_in_summaries(tmp_path: Path) -> None:
    """The estimated size is of the order of the norm of the difference, distributed over all elements."""
    large = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    other = large.clone()
    other[31_415] += 50.0
    a = read_trace(summarized(tmp_path, "a.json", large))
    first = compare(a, read_trace(summarized(tmp_path, "b.json", other))).first
    assert first is not None
    assert first.part is Part.UPDATE
    assert first.size == pytest.approx(50.0 / math.sqrt(100_000), rel=0.5)
    assert compare(a, read_trace(summarized(tmp_path, "c.json", large))).equal


def test_a_summary_is_compared_with_a_full_tensor(tmp_path: Path) -> None:
    """The full tensor is summarized in the same way."""
    large = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    full = read_trace(summarized(tmp_path, "full.json", large, full=True))
    assert compare(full, read_trace(summarized(tmp_path, "b.json", large))).equal
    first = compare(full, read_trace(summarized(tmp_path, "c.json", large * 1.5))).first
    assert first is not None
    assert first.note == "1.5 times the value in the first trace"


def test_the_mean_of_summaries_is_the_summary_of_the_mean(tmp_path: Path) -> None:
    """Local gradients of two ranks that are summarized have the same mean as the gradient of one process."""
    parts = [torch.randn(5_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for rank, part in enumerate(parts):
        writer = TraceWriter(tmp_path / "two.json", rank=rank, world_size=2, full=False)
        write_step(writer, {**values(1, rank, 2), "local": {"w": part}})
        writer.close()
    writer = TraceWriter(tmp_path / "one.json", full=False)
    combined = {**values(1, 0, 2), "samples": ["sample 1 0", "sample 1 1"], "loss": 3.0}
    write_step(writer, {**combined, "local": {"w": (parts[0] + parts[1]) / 2}})
    result = compare(read_trace(writer.close()), read_trace(tmp_path / "two.json"), Tolerances(relative=1e-6))
    assert result.first is None
