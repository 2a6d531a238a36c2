"""Plans of DeepSpeed have the static sizes of real runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import stratagem
from stratagem.strategies.choice import choose_strategy
from tests.support.planned_models import MODELS, OPTIMIZER, bytes_of
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed


def _measured(kind: str, strategy: dict[str, Any], folder: str) -> dict[str, int]:
    """Train some steps; return the bytes of the tensors of the engine on this rank."""
    make_model, make_batch = MODELS[kind]
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's compiler, which DeepSpeed imports
    built = choose_strategy(
        strategy, launcher="pytorch", work_dir=folder, experiment_name=None, env_cfg=None, randomness=None,
        auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    built.prepare(make_model(), optim_wrapper=OPTIMIZER, dispatch_kwargs={"max_iters": 9})
    inner: Any = built.optim_wrapper.optimizer
    model = built.unwrap_model()
    for _ in range(2):
        built.model.train_step(make_batch(), optim_wrapper=built.optim_wrapper)
    seen: list[Tensor] = []
    step = inner.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        updated = [each for group in inner.param_groups for each in group["params"]]
        seen.extend(each.grad for each in (*updated, *model.parameters()) if each.grad is not None)
        return step(*args, **kwargs)

    inner.step = noting
    built.model.train_step(make_batch(), optim_wrapper=built.optim_wrapper)
    buffer = getattr(built.optim_wrapper.engine.optimizer, "grad_partitions_flat_buffer", None)
    gradients = bytes_of(seen) + (0 if buffer is None else buffer.nbytes)
    parameters = [*model.parameters(), *(each.ds_tensor for each in model.parameters() if hasattr(each, "ds_tensor"))]
    updated = [each for group in inner.param_groups for each in group["params"]]
    own = {each.untyped_storage()._cdata for each in parameters}
    state = [each for each in tree_leaves(dict(inner.state)) if isinstance(each, Tensor)]
    found = {
        "parameters": bytes_of(parameters),
        "gradients": gradients,
        "optimizer_state": bytes_of(state),
        "master_weights": bytes_of(each for each in updated if each.untyped_storage()._cdata not in own),
        "buffers": bytes_of(model.buffers()),
    }
    built.close()
    return found


_CASES = [
    *(("images", {"stage": stage}, {}) for stage in range(4)),
    *(("language", {"stage": stage}, {"bf16": True}) for stage in range(4)),
    ("language", {"stage": 3, "stage3_param_persistence_threshold": 100}, {}),
]


@pytest.mark.parametrize(("kind", "zero", "options"), _CASES)
def test_static_sizes_are_those_of_real_runs(
    two: Ranks, folder: Path, kind: str, zero: dict[str, Any], options: dict[str, Any]
) -> None:
    """Parameters, gradients, optimizer state and master weights have the bytes of the rank with the most."""
    strategy = {"type": "DeepSpeedStrategy", "zero_optimization": zero, **options}
    real = two.run(_measured, kind, strategy, str(folder))
    make_model, make_batch = MODELS[kind]
    plan = stratagem.plan(make_model(), optim_wrapper=OPTIMIZER, batch=make_batch(), strategies=[strategy], worlds=[2])
    memory = plan.steps[0].memory
    assert plan.steps[0].refusal is None
    assert {name: getattr(memory, name) for name in real[0]} == {
        name: max(real[0][name], real[1][name]) for name in real[0]
    }
