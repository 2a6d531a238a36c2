"""The engine's cost in function calls, which are the same on every machine; seconds are for the benchmark."""

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
    """The two ways to train that the benchmark compares."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("mlp_arms")


@pytest.mark.parametrize("listed", [False, True])
def test_an_iteration_makes_few_calls_more_than_a_loop_by_hand(arms: ModuleType, *, listed: bool) -> None:
    """With logging every 50 iterations and a schedule, the engine adds at most 20 calls to an iteration."""
    arms.train_with_engine(50, arms.CpuClock(), listed=listed)  # loads what loads at first use
    hand, engine = arms.CallCounter(), arms.CallCounter()
    by_hand = arms.train_by_hand(ITERATIONS, hand, listed=listed)
    by_engine = arms.train_with_engine(ITERATIONS, engine, listed=listed)
    assert (engine.calls - hand.calls) / ITERATIONS <= MOST_CALLS
    # Else the two did not do the same work, and their calls say nothing.
    assert arms.final_loss(by_engine, ITERATIONS) == pytest.approx(arms.final_loss(by_hand, ITERATIONS), rel=1e-5)
