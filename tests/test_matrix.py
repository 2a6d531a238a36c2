"""The matrix of placements, optimizers and cases covers all pairs."""

from __future__ import annotations

import importlib
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The axes and the choice of runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("matrix_axes")


def test_every_pair_of_values_occurs_in_a_run(axes: ModuleType) -> None:
    """The chosen runs contain each pair of placements, and each pair with an optimizer and a case that is not refused."""
    names = list(axes.PLACEMENTS)
    runs = axes.choose(names, full=False).resumes
    found = set().union(*map(axes.pairs_in, runs))
    expected = {(("saver", one), ("resumer", other)) for one, other in product(names, names)}
    for name, optimizer, case in product(names, axes.OPTIMIZERS_COMPARED, axes.CASES):
        if not axes.refusal(name, optimizer, case):
            expected |= {(("resumer", name), ("optimizer", optimizer)), (("resumer", name), ("case", case))}
            expected |= {(("saver", name), ("optimizer", optimizer)), (("saver", name), ("case", case))}
            expected |= {(("optimizer", optimizer), ("case", case))}
    assert expected <= found
    assert len(runs) < 1.2 * len(names) ** 2


def test_every_checkpoint_and_reference_is_among_the_uninterrupted_runs(axes: ModuleType) -> None:
    """No run resumes from a checkpoint that is not saved, and none is compared with a run that does not take place."""
    for full in (False, True):
        names = ["single", "DDP x2", "FSDP x4", "TP x2", "ZeRO 2 x2"]
        plan = axes.choose(names, full=full)
        for saver, job in plan.resumes:
            assert job._replace(placement=saver) in plan.whole
            reference = axes.reference(names, job, saver)
            assert reference is None or reference in plan.whole
        assert all(axes.refusal(*job) for job in plan.refused)
        assert not any(axes.refusal(*job) for job in plan.whole)


def test_one_in_500_elements_may_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second largest difference counts in a tensor of 500 elements, and the largest one in a smaller tensor."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    matrix = importlib.import_module("matrix")
    small, large = torch.ones(499), torch.ones(500)
    changed = small.clone(), large.clone()
    for each in changed:
        each[7], each[8] = 1.5, 1.25
    for one, other, expected in ((changed[0], small, 0.5), (changed[1], large, 0.25)):
        assert matrix.difference({"a": one}, {"a": other}, few=500) == expected
        assert matrix.difference({"a": one}, {"a": other}) == 0.5
