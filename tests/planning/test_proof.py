"""The proof of plans, with the examples on two ranks; ``make proof-plan`` runs all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.plan_proof.jobs import CASES
from tests.support.plan_proof.trial import Comparison, compare, measured
from tests.support.ranks import Ranks

_COMPARED = (
    ("GPT example", "DDP"),
    ("GPT example", "FSDP, activation checkpointing"),
    ("GPT example", "FSDP, 5 micro-batches"),
    ("GPT example", "FSDP, Muon and AdamW"),
    ("GPT example", "TP x2"),
    ("MNIST example", "FSDP, EMA"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), _COMPARED)
def test_a_plan_equals_a_run_of_two_ranks(ranks: Ranks, tmp_path: Path, model: str, name: str) -> None:
    """Static sizes, collectives and operations are equal, and activations and the peak are within 5 %."""
    case = next(each for each in CASES if each.name == name)
    real = ranks.run_within(180, measured, model, name, str(tmp_path))
    assert compare(model, case, 2, real).different == []


EQUAL = Comparison(
    model="", case=CASES[0], world=1, static={"parameters": (8, 8)}, activations=(100, 96), peak=(200, 200),
    allocator_peak=210, collectives={"all_reduce": (1, 1)}, flops=(7, 7),
)  # fmt: skip


def test_a_byte_of_a_static_size_counts_as_different() -> None:
    """Static sizes, collectives and operations must be equal."""
    assert EQUAL.different == []
    assert replace(EQUAL, static={"parameters": (8, 9)}).different == ["parameters: 8 planned, 9 real"]
    assert replace(EQUAL, collectives={"all_reduce": (1, 2)}).different == ["all_reduce: 1 planned, 2 real"]
    assert replace(EQUAL, flops=(7, 8)).different == ["operations: 7 planned, 8 real"]


def test_a_peak_may_differ_by_five_percent() -> None:
    """189 is 5.5 % less than 200."""
    assert replace(EQUAL, peak=(190, 200)).different == []
    assert replace(EQUAL, peak=(189, 200)).different == ["peak: 189 planned, 200 real, -5.5 %"]
