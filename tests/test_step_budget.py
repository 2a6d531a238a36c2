"""The overhead of the runner in function calls, which is the same on every machine. Benchmarks measure the time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _arms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the training loops of the benchmark importable, and use one thread as it does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.split(".")[0] == "step_arms"]:
        del sys.modules[name]


def count_calls(engine: str, job: Any) -> tuple[float, list[float]]:
    """Train a job; return the number of calls per iteration and the trained weights."""
    gate = importlib.import_module("step_arms.gate")
    networks: list[nn.Module] = []

    def model() -> nn.Module:
        networks.append(job.model())
        return networks[0]

    counter = gate.CallGate()
    with suppress(gate.Stop):
        importlib.import_module(f"step_arms.{engine}").train(replace(job, model=model), counter, 0)
    return counter.calls, nn.utils.parameters_to_vector(networks[0].parameters()).tolist()


@pytest.mark.parametrize("name", ["dataset", "tensors", "accumulation"])
def test_an_iteration_makes_no_more_calls_than_a_manual_loop(name: str) -> None:
    """With an ordinary dataset, all default hooks and a schedule, the runner makes fewer calls than a hand-written loop."""
    job = importlib.import_module("step_arms.jobs").JOBS[name]
    count_calls("stratagem_arm", job)  # triggers imports on first use
    by_hand, expected = count_calls("hand", job)
    by_runner, weights = count_calls("stratagem_arm", job)
    assert by_runner <= by_hand
    # Otherwise the loops did different work, and their numbers of calls cannot be compared.
    assert weights == pytest.approx(expected, rel=1e-4, abs=1e-6)
