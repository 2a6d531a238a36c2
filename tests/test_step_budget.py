"""The overhead of the engine in function calls, which is the same on every machine. Benchmarks measure the time."""

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
    """With logging every 50 iterations and a schedule, the engine adds at most 20 calls per iteration."""
    arms.train_with_engine(50, arms.CpuClock(), listed=listed)  # triggers imports on first use
    hand, engine = arms.CallCounter(), arms.CallCounter()
    by_hand = arms.train_by_hand(ITERATIONS, hand, listed=listed)
    by_engine = arms.train_with_engine(ITERATIONS, engine, listed=listed)
    assert (engine.calls - hand.calls) / ITERATIONS <= MOST_CALLS
    # Otherwise the loops did different work, and their numbers of calls cannot be compared.
    assert arms.final_loss(by_engine, ITERATIONS) == pytest.approx(arms.final_loss(by_hand, ITERATIONS), rel=1e-5)
