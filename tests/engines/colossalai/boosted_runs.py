"""The small language model of ``sharded_runs`` with ColossalAI's plugins, and the values to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stratagem.checkpoint import ShardedTensorState
from stratagem.strategies import BaseStrategy, ColossalAIStrategy
from tests.support import sharded_runs
from tests.support.sharded_runs import EPOCH, GLOBAL_BATCH, SCHEDULE, TP_PLAN, Gpt, Sentences
from tests.support.training_loop import iterations

# The options of the strategy for each named plugin configuration in the tests.
PLUGINS: Mapping[str, Mapping[str, Any]] = {
    "torch-ddp": {"plugin": "torch-ddp"},
    "zero 1": {"plugin": "lowlevel-zero"},
    "zero 2": {"plugin": {"type": "lowlevel-zero", "stage": 2}},
    "zero 1 bf16": {"plugin": "lowlevel-zero", "mixed_precision": "bf16"},
    "zero 2 bf16": {"plugin": {"type": "lowlevel-zero", "stage": 2}, "mixed_precision": "bf16"},
    "zero 1 fp16": {"plugin": "lowlevel-zero", "mixed_precision": {"type": "fp16", "init_scale": 2.0**10}},
    "zero 2 bf16 alone": {
        "plugin": {"type": "lowlevel-zero", "stage": 2, "master_weights": False},
        "mixed_precision": "bf16",
    },
    "zero 1 offloaded": {
        "plugin": {"type": "LowLevelZeroPlugin", "cpu_offload": True, "communication_dtype": "float32"}
    },
    "hybrid": {"plugin": "hybrid-parallel"},
    "hybrid bf16": {"plugin": "hybrid-parallel", "mixed_precision": "bf16"},
    "hybrid zero 1 bf16": {"plugin": {"type": "hybrid-parallel", "zero_stage": 1}, "mixed_precision": "bf16"},
    "hybrid tp 2 by plan": {"plugin": {"type": "hybrid-parallel", "tp_size": 2}},
    "hybrid tp 2": {"plugin": {"type": "hybrid-parallel", "tp_size": 2}},
    "hybrid tp 2 zero 1 bf16": {
        "plugin": {"type": "hybrid-parallel", "tp_size": 2, "zero_stage": 1},
        "mixed_precision": "bf16",
    },
}


class PlannedGpt(Gpt):
    """A model with its own tensor parallel plan."""

    tp_plan = TP_PLAN


def prepared(name: str, folder: str, **options: Any) -> BaseStrategy:
    """Return a prepared strategy of ``PLUGINS`` or ``sharded_runs``, with a model, an optimizer, and a schedule."""
    if name in sharded_runs.PLACEMENTS:
        return sharded_runs.prepared(name, folder, **options)
    own_model = {"type": PlannedGpt if name.endswith("by plan") else Gpt}
    optim, model = options.pop("optim", sharded_runs.OPTIM), options.pop("model", own_model)
    compiling, iterations = options.pop("compile", False), options.pop("iterations", EPOCH)
    own = dict(PLUGINS.get(name, {}))
    if "tp 2" in name and not name.endswith("by plan"):
        # Given by name, because the policy's module can only be imported after the strategy has loaded the library.
        own["plugin"] = {**own["plugin"], "custom_policy": {"type": "tests.engines.colossalai.policies.GptPolicy"}}
    strategy = ColossalAIStrategy(
        work_dir=folder,
        env_kwargs={"randomness": {"seed": 0}},
        log_kwargs={"log_level": "ERROR"},
        **{**own, **options},
    )
    try:
        strategy.prepare(
            model,
            optim_wrapper=optim,
            param_scheduler=SCHEDULE,
            compile=compiling,
            dispatch_kwargs={"epoch_length": EPOCH, "max_iters": iterations, "train_micro_batch_size_per_gpu": 4},
        )
    except BaseException:
        strategy.close()
        raise
    return strategy


def train(strategy: BaseStrategy, start: int, stop: int) -> dict[str, Any]:
    """Train iterations ``start`` to ``stop``; return the values to compare, with losses averaged over ranks."""
    seen: dict[str, list[Any]] = {"losses": [], "rates": [], "norms": []}
    for step in iterations(strategy, Sentences(), start, stop, global_batch=GLOBAL_BATCH):
        seen["rates"] += step.rates
        seen["losses"].append(step.mean_loss)
        if step.updated:
            seen["norms"].append(step.grad_norm)
    optim = strategy.optim_wrapper
    return {**seen, **state_of(strategy), "updates": optim.num_steps_applied, "attempts": optim.num_steps_attempted}


def state_of(strategy: Any) -> dict[str, Any]:
    """Return unsharded weights and optimizer states on every rank, and the optimizer's options."""
    model = strategy.unwrap_model()
    optim = strategy._access.optim_state(strategy.optim_wrapper, model)
    return {
        "weights": {name: whole(value) for name, value in strategy._access.model_state(model).items()},
        "moments": {
            f"{name}/{slot}": whole(value)
            for name, slots in sorted(optim["state"].items())
            for slot, value in slots.items()
        },
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optim["param_groups"]],
        "scale": optim.get("loss_scaler"),
    }


def whole(value: Any) -> Any:
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
    if isinstance(value, ShardedTensorState) or hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return torch.as_tensor(value).detach().clone()


def trained(name: str, folder: str, stop: int = EPOCH, **options: Any) -> dict[str, Any]:
    """Train from the first iteration."""
    strategy = prepared(name, folder, **options)
    try:
        return train(strategy, 0, stop)
    finally:
        strategy.close()


def stopped(name: str, folder: str, checkpoint: str, at: int, **options: Any) -> dict[str, Any]:
    """Train to iteration ``at``, save, and continue to the end."""
    strategy = prepared(name, folder, **options)
    try:
        before = train(strategy, 0, at)
        strategy.save_checkpoint(checkpoint, extra_ckpt={"meta": {"iter": at}})
        return {"before": before, "after": train(strategy, at, EPOCH)}
    finally:
        strategy.close()


def resumed(name: str, folder: str, checkpoint: str, at: int, **options: Any) -> dict[str, Any]:
    """Resume a checkpoint of iteration ``at`` and train to the end; return the restored state too."""
    strategy = prepared(name, folder, **options)
    try:
        strategy.resume(checkpoint)
        return {"found": state_of(strategy), "after": train(strategy, at, EPOCH)}
    finally:
        strategy.close()


def resumed_and_saved(name: str, folder: str, source: Any, target: Any, **options: Any) -> dict[str, Any]:
    """Resume, save to another path, and return the restored state."""
    strategy = prepared(name, folder, **options)
    try:
        strategy.resume(str(source))
        strategy.save_checkpoint(str(target))
        return state_of(strategy)
    finally:
        strategy.close()
