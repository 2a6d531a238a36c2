"""Plans of DeepSpeed have the static sizes, collectives and operations of real runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.planning.result import StepPlan
from tests.support.engine_sizes import SIZES, measured_engine, planned_engine
from tests.support.planned_models import MODELS, planned_collectives
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed


def _measured(kind: str, strategy: dict[str, Any], folder: str, accumulation: int = 1) -> dict[str, Any]:
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's compiler, which DeepSpeed imports
    return measured_engine(MODELS[kind], strategy, folder, accumulation)


def _all_measured(cases: list[tuple[str, dict[str, Any], int]], folder: str) -> list[dict[str, Any]]:
    return [_measured(kind, strategy, folder, accumulation) for kind, strategy, accumulation in cases]


def _strategy(zero: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {"type": "DeepSpeedStrategy", "zero_optimization": zero, **options}


def _planned(kind: str, strategy: dict[str, Any], world: int, accumulation: int = 1) -> StepPlan:
    return planned_engine(MODELS[kind], strategy, world, accumulation)


def _require_equal(step: StepPlan, ranks: list[dict[str, Any]]) -> None:
    """Compare static sizes with those of the rank with the most, and collectives and operations with those of rank 0."""
    host = {name: step.memory.host.get(name.replace("_", " "), 0) for name in SIZES}
    planned = {name: getattr(step.memory, name) + host[name] for name in SIZES}
    assert planned == {name: max(each[name] for each in ranks) for name in SIZES}
    assert planned_collectives(step) == ranks[0]["collectives"]
    assert step.flops == ranks[0]["flops"]


_CASES = [
    *(("images", {"stage": stage}, {}) for stage in range(4)),
    *(("language", {"stage": stage}, {"bf16": True}) for stage in range(4)),
    ("language", {"stage": 3, "stage3_param_persistence_threshold": 100}, {}),
]


_BUCKETS = {"reduce_bucket_size": 3000}
_GATHERS = {
    "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 5000, "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 10_000, "reduce_bucket_size": 5000,
}  # fmt: skip
_SPLIT = [
    ("language", _strategy({"stage": 2, **_BUCKETS}, {}), 1),
    ("language", _strategy({"stage": 1, **_BUCKETS}, {"bf16": True}), 2),
    ("language", _strategy({"stage": 2, "reduce_scatter": False, **_BUCKETS}, {}), 1),
    ("language", _strategy({"stage": 3, **_GATHERS}, {}), 1),
    ("language", _strategy({"stage": 0}, {"bf16": True}), 5),
    ("language", _strategy({"stage": 3, "stage3_param_persistence_threshold": 100}, {"bf16": True}), 3),
]


@pytest.mark.parametrize(("kind", "zero", "options"), _CASES)
def test_plans_of_two_ranks_are_those_of_real_runs(
    two: Ranks, folder: Path, kind: str, zero: dict[str, Any], options: dict[str, Any]
) -> None:
    """Static sizes have the bytes of the rank with the most; collectives and operations are those of a real step."""
    strategy = _strategy(zero, options)
    real = two.run(_measured, kind, strategy, str(folder))
    _require_equal(_planned(kind, strategy, 2), real)


def _require_all_equal(ranks: Ranks, folder: Path, cases: list[tuple[str, dict[str, Any], int]]) -> None:
    real = ranks.run_within(180, _all_measured, cases, str(folder))
    for number, (kind, strategy, accumulation) in enumerate(cases):
        _require_equal(_planned(kind, strategy, ranks.size, accumulation), [each[number] for each in real])


def test_plans_of_one_rank_are_those_of_real_runs(one: Ranks, folder: Path) -> None:
    """With one rank, DeepSpeed still reduces gradients, but gathers nothing."""
    _require_all_equal(one, folder, [("language", _strategy({"stage": stage}, {}), 1) for stage in range(4)])


def test_plans_of_four_ranks_are_those_of_real_runs(four: Ranks, folder: Path) -> None:
    """With four ranks, parameters of all stages are padded and divided as in real runs."""
    _require_all_equal(four, folder, [("images", _strategy({"stage": stage}, {}), 1) for stage in range(4)])


def test_plans_split_messages_like_real_runs(four: Ranks, folder: Path) -> None:
    """Buckets, prefetches and accumulated micro-batches lead to the same messages as in real runs."""
    _require_all_equal(four, folder, _SPLIT)


_NO_LIVE = {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}
_LIMITS = [
    ("language", _strategy({"stage": 3, "stage3_param_persistence_threshold": 0, **_NO_LIVE}, {}), 3),
    *(
        ("irregular", _strategy({"stage": 3, "stage3_param_persistence_threshold": 100, **limits}, {}), accumulation)
        for limits, accumulation in (
            ({}, 1),
            (_NO_LIVE, 5),
            ({"stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 500}, 3),
            ({"stage3_prefetch_bucket_size": 1000, "stage3_max_reuse_distance": 0}, 2),
        )
    ),
]


def test_plans_of_stage_3_gather_like_real_runs(two: Ranks, folder: Path) -> None:
    """Limits, accumulated micro-batches, reused and shared layers and frozen parameters lead to the gathers of real runs."""
    _require_all_equal(two, folder, _LIMITS)


def test_plans_of_an_offloaded_optimizer_are_those_of_real_runs(two: Ranks, folder: Path) -> None:
    """Gradients, master weights and optimizer state are in the memory of the host, and messages are the same."""
    strategy = _strategy({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"bf16": True})
    real = two.run(_measured, "language", strategy, str(folder))
    step = _planned("language", strategy, 2)
    assert (step.memory.gradients, step.memory.optimizer_state, step.memory.master_weights) == (0, 0, 0)
    assert step.memory.host["optimizer state"] == real[0]["optimizer_state"]
    assert planned_collectives(step) == real[0]["collectives"]


def _keeps_linear(strategy: dict[str, Any], folder: str) -> bool:
    """Train, and return whether ``linear`` is torch's function afterwards."""
    nn.functional.linear = torch._C._nn.linear
    _measured("language", strategy, folder)
    return nn.functional.linear is torch._C._nn.linear


def test_closing_stage_3_restores_the_function_of_linear_layers(two: Ranks, folder: Path) -> None:
    """DeepSpeed replaces nn.functional.linear for stage 3; strategies that follow in the process use torch's function."""
    assert two.run(_keeps_linear, _strategy({"stage": 3}, {}), str(folder)) == [True, True]


def test_the_peak_of_a_plan_includes_the_buckets(folder: Path) -> None:
    """The bucket of stage 2 has reduce_bucket_size elements, and the largest micro-batch shrinks accordingly."""
    plans = [
        _planned("language", _strategy({"stage": 2, "reduce_bucket_size": size}, {}), 2) for size in (10**5, 10**6)
    ]
    peaks = [step.memory.peak or 0 for step in plans]
    assert peaks[1] - peaks[0] == 4 * (10**6 - 10**5)
    assert [step.memory.at_peak["communication"] for step in plans] == [4 * 10**5, 4 * 10**6]
