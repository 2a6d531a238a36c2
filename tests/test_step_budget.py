"""The overhead of the runner in function calls, which is the same on every machine. Benchmarks measure the time."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ITERATIONS = 200
MOST_CALLS = 20


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The two training loops that the benchmark compares."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("mlp_arms")


@pytest.mark.parametrize("listed", [False, True])
def test_an_iteration_adds_few_calls_to_a_manual_loop(arms: ModuleType, *, listed: bool) -> None:
    """With logging every 50 iterations and a schedule, the runner adds at most 20 calls per iteration."""
    arms.train_with_runner(50, arms.CpuClock(), listed=listed)  # triggers imports on first use
    hand, runner = arms.CallCounter(), arms.CallCounter()
    by_hand = arms.train_by_hand(ITERATIONS, hand, listed=listed)
    by_runner = arms.train_with_runner(ITERATIONS, runner, listed=listed)
    assert (runner.calls - hand.calls) / ITERATIONS <= MOST_CALLS
    # Otherwise the loops did different work, and their numbers of calls cannot be compared.
    assert arms.final_loss(by_runner, ITERATIONS) == pytest.approx(arms.final_loss(by_hand, ITERATIONS), rel=1e-5)
