"""The overhead of the runner in function calls, which is the same on every machine. Benchmarks measure the time."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def new_process() -> Iterator[Executor]:
    """A process that trains nothing else, as a user's does.

    In the process of the tests, other tests can have changed what the loops call. If any object except a module holds a function
    of the module ``random``, for example, the runner seeds Python's generator for every sample.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _import_benchmarks) as executor:
        yield executor


def _import_benchmarks() -> None:
    """Make the training loops of the benchmark importable, and use one thread as it does."""
    sys.path.insert(0, str(BENCHMARKS))
    torch.set_num_threads(1)


def count_calls(engine: str, name: str) -> tuple[float, list[float]]:
    """Train a job; return the number of calls per iteration and the trained weights."""
    gate = importlib.import_module("step_arms.gate")
    job: Any = importlib.import_module("step_arms.jobs").JOBS[name]
    networks: list[nn.Module] = []

    def model() -> nn.Module:
        networks.append(job.model())
        return networks[0]

    counter = gate.CallGate()
    with suppress(gate.Stop):
        importlib.import_module(f"step_arms.{engine}").train(replace(job, model=model), counter, 0)
    return counter.calls, nn.utils.parameters_to_vector(networks[0].parameters()).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dataset", "tensors", "accumulation"])
def test_an_iteration_makes_no_more_calls_than_a_manual_loop(new_process: Executor, name: str) -> None:
    """With an ordinary dataset, all default hooks and a schedule, the runner makes fewer calls than a hand-written loop."""
    new_process.submit(count_calls, "stratagem_arm", name).result()  # triggers imports on first use
    by_hand, expected = new_process.submit(count_calls, "hand", name).result()
    by_runner, weights = new_process.submit(count_calls, "stratagem_arm", name).result()
    assert by_runner <= by_hand
    # Otherwise the loops did different work, and their numbers of calls cannot be compared.
    assert weights == pytest.approx(expected, rel=1e-4, abs=1e-6)
