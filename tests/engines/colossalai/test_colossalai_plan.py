"""Plans of ColossalAI have the static sizes, collectives and operations of real runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stratagem
from stratagem import SupervisedModel
from stratagem.planning.result import StepPlan
from stratagem.planning.trace import StepTrace
from stratagem.strategies.choice import choose_strategy
from tests.support.planned_models import MODELS, OPTIMIZER, bytes_of, counted, planned_collectives
from tests.support.ranks import Ranks

pytestmark = pytest.mark.colossalai

STATIC = ("parameters", "gradients", "optimizer_state", "master_weights", "buffers")
Case = tuple[dict[str, Any], int]


def _odd() -> SupervisedModel:
    """Return a model whose parameters must be padded: 35 + 7 + 21 + 3 elements."""
    return SupervisedModel(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), nn.MSELoss())


def _odd_batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 5), torch.zeros(4, 3)


KINDS: dict[str, Any] = {**MODELS, "odd": (_odd, _odd_batch)}


def _stored(engine: Any) -> Iterator[Tensor]:
    """Yield the gradients that ZeRO stores outside of the parameters."""
    for store in getattr(engine, "pg_to_grad_store", {}).values():
        yield from (each for each in tree_leaves(store._grads_of_params) if isinstance(each, Tensor))


def _measured(kind: str, strategy: dict[str, Any], accumulation: int, folder: str) -> dict[str, Any]:
    """Train some steps; return the bytes of the tensors of the engine on this rank, and the collectives of a step."""
    make_model, make_batch = KINDS[kind]
    torch.manual_seed(0)
    built = choose_strategy(
        strategy, launcher="pytorch", work_dir=folder, experiment_name=None, env_cfg=None, randomness=None,
        auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    optim_wrapper = {**OPTIMIZER, "accumulative_counts": accumulation}
    built.prepare(make_model(), optim_wrapper=optim_wrapper, dispatch_kwargs={"max_iters": 99})
    model = built.unwrap_model()
    engine: Any = built.optim_wrapper.engine
    inner: Any = engine.optim

    def train() -> None:
        for _ in range(accumulation):
            built.model.train_step(make_batch(), optim_wrapper=built.optim_wrapper)

    train()
    train()
    seen: list[Tensor] = []
    step = inner.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        updated = [each for group in inner.param_groups for each in group["params"]]
        seen.extend(each.grad for each in (*updated, *model.parameters()) if each.grad is not None)
        seen.extend(_stored(engine))
        return step(*args, **kwargs)

    inner.step = noting
    trace = StepTrace({})
    with trace:
        train()
    inner.step = step
    gradients = bytes_of(seen)
    seen.clear()
    updated = [each for group in inner.param_groups for each in group["params"]]
    own = {each.untyped_storage()._cdata for each in model.parameters()}
    state = [each for each in tree_leaves(dict(inner.state)) if isinstance(each, Tensor)]
    found = {
        "parameters": bytes_of(model.parameters()),
        "gradients": gradients,
        "optimizer_state": bytes_of(state),
        "master_weights": bytes_of(each for each in updated if each.untyped_storage()._cdata not in own),
        "buffers": bytes_of(model.buffers()),
        "collectives": counted(trace.calls),
        "flops": trace.flops,
    }
    built.close()
    return found


def _all_measured(kind: str, cases: list[Case], folder: str) -> list[dict[str, Any]]:
    return [_measured(kind, strategy, accumulation, folder) for strategy, accumulation in cases]


def _strategy(plugin: Any, precision: Any = None) -> dict[str, Any]:
    mixed = {} if precision is None else {"mixed_precision": precision}
    return {"type": "ColossalAIStrategy", "plugin": plugin, **mixed}


def _planned(kind: str, strategy: dict[str, Any], world: int, accumulation: int = 1) -> StepPlan:
    make_model, make_batch = KINDS[kind]
    optim_wrapper = {**OPTIMIZER, "accumulative_counts": accumulation}
    [step] = stratagem.plan(
        make_model(), optim_wrapper=optim_wrapper, batch=make_batch(), strategies=[strategy], worlds=[world]
    ).steps
    assert (step.refusal, step.failure) == (None, None)
    return step


def _require_equal(ranks: Ranks, folder: Path, kind: str, cases: list[Case]) -> None:
    """Compare static sizes with those of the rank with the most, and collectives and operations with those of rank 0."""
    real = ranks.run_within(180, _all_measured, kind, cases, str(folder))
    for number, (strategy, accumulation) in enumerate(cases):
        each = [results[number] for results in real]
        step = _planned(kind, strategy, ranks.size, accumulation)
        found = {name: getattr(step.memory, name) for name in STATIC}
        assert (strategy, found) == (strategy, {name: max(one[name] for one in each) for name in STATIC})
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
