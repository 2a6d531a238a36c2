"""Plans of ColossalAI have the static sizes, collectives and operations of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import SupervisedModel
from tests.support.engine_sizes import SIZES, measured_engine, planned_engine
from tests.support.planned_models import MODELS, planned_collectives
from tests.support.ranks import Ranks

pytestmark = pytest.mark.colossalai

Case = tuple[dict[str, Any], int]


def _odd() -> SupervisedModel:
    """Return a model whose parameters must be padded: 35 + 7 + 21 + 3 elements."""
    return SupervisedModel(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), nn.MSELoss())


def _odd_batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 5), torch.zeros(4, 3)


KINDS: dict[str, Any] = {**MODELS, "odd": (_odd, _odd_batch)}


def _all_measured(kind: str, cases: list[Case], folder: str) -> list[dict[str, Any]]:
    return [measured_engine(KINDS[kind], strategy, folder, accumulation) for strategy, accumulation in cases]


def _strategy(plugin: Any, precision: Any = None) -> dict[str, Any]:
    mixed = {} if precision is None else {"mixed_precision": precision}
    return {"type": "ColossalAIStrategy", "plugin": plugin, **mixed}


def _require_equal(ranks: Ranks, folder: Path, kind: str, cases: list[Case]) -> None:
    """Compare static sizes with those of the rank with the most, and collectives and operations with those of rank 0."""
    real = ranks.run_within(180, _all_measured, kind, cases, str(folder))
    for number, (strategy, accumulation) in enumerate(cases):
        each = [results[number] for results in real]
        step = planned_engine(KINDS[kind], strategy, ranks.size, accumulation)
        found = {name: getattr(step.memory, name) for name in SIZES}
        assert (strategy, found) == (strategy, {name: max(one[name] for one in each) for name in SIZES})
        assert (strategy, planned_collectives(step)) == (strategy, each[0]["collectives"])
        assert step.flops == each[0]["flops"]


_ANY_SIZE: list[Case] = [
    (_strategy("torch-ddp"), 1),
    (_strategy("lowlevel-zero"), 1),
    (_strategy({"type": "lowlevel-zero", "stage": 2}, "bf16"), 1),
    (_strategy("lowlevel-zero", {"type": "fp16", "initial_scale": 1}), 1),
    (_strategy("hybrid-parallel"), 1),
    (_strategy("hybrid-parallel", "bf16"), 1),
    (_strategy({"type": "hybrid-parallel", "zero_stage": 1}, "bf16"), 1),
]
_TENSOR_PARALLEL: list[Case] = [
    (_strategy({"type": "hybrid-parallel", "tp_size": 2}), 1),
    (_strategy({"type": "hybrid-parallel", "tp_size": 2}, "bf16"), 1),
    (_strategy({"type": "hybrid-parallel", "tp_size": 2, "zero_stage": 2}, "bf16"), 1),
]
_BUCKETS: list[Case] = [
    (_strategy({"type": "lowlevel-zero", "reduce_bucket_size_in_m": 0.004}), 1),
    (_strategy({"type": "lowlevel-zero", "stage": 2, "reduce_bucket_size_in_m": 0.004}, "bf16"), 3),
    (_strategy({"type": "lowlevel-zero", "communication_dtype": "bfloat16"}), 2),
    (_strategy({"type": "lowlevel-zero", "master_weights": False}), 1),
    (_strategy({"type": "torch-ddp", "bucket_cap_mb": 0.02}), 5),
]


def test_plans_of_one_rank_are_those_of_real_runs(one: Ranks, tmp_path: Path) -> None:
    """With one rank, plugins still reduce gradients and gather parameters."""
    _require_equal(one, tmp_path, "language", _ANY_SIZE)


def test_plans_of_two_ranks_are_those_of_real_runs(two: Ranks, tmp_path: Path) -> None:
    """Every supported plugin and precision has the static sizes and messages of real runs."""
    _require_equal(two, tmp_path, "language", [*_ANY_SIZE, *_TENSOR_PARALLEL])


def test_plans_of_four_ranks_are_those_of_real_runs(four: Ranks, tmp_path: Path) -> None:
    """With four ranks, tensor parallelism and data parallelism have separate groups."""
    _require_equal(four, tmp_path, "language", [*_ANY_SIZE, *_TENSOR_PARALLEL])


def test_plans_split_messages_like_real_runs(two: Ranks, tmp_path: Path) -> None:
    """Small buckets, other dtypes of messages and accumulated micro-batches lead to the same messages as in real runs."""
    _require_equal(two, tmp_path, "language", _BUCKETS)


def test_plans_pad_parameters_like_real_runs(four: Ranks, tmp_path: Path) -> None:
    """Parameters whose elements four ranks cannot divide are padded, and the weights of losses are summed over ranks."""
    _require_equal(four, tmp_path, "odd", _ANY_SIZE[:4])
