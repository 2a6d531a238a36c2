"""Runs of the small language model with DeepSpeed and with the strategies that it is compared to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stratagem.checkpoint import CheckpointLoader
from stratagem.registry import STRATEGIES
from stratagem.strategies import BaseStrategy
from stratagem.utils import import_module
from tests.support.sharded_runs import EPOCH, GLOBAL_BATCH, OPTIM, SCHEDULE, Gpt, Sentences
from tests.support.training_loop import iterations

FP32: Mapping[str, Mapping[str, Any]] = {
    "ZeRO-0": {"zero_optimization": {"stage": 0}},
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    # With a threshold of 0 every parameter is sharded, including the small ones.
    "ZeRO-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "ZeRO-3 kept": {"zero_optimization": {"stage": 3}},
    "ZeRO-2 offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "ZeRO-3 offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_param_persistence_threshold": 0,
        }
    },
}
OTHERS: Mapping[str, dict[str, Any]] = {
    "single": {"type": "SingleDeviceStrategy"},
    "DDP": {"type": "DDPStrategy"},
    "FSDP": {"type": "FSDPStrategy"},
}


def placed(name: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of a strategy by its name in these tests, with ``options`` added."""
    if name in OTHERS:
        return {**OTHERS[name], **options}
    return {"type": "DeepSpeedStrategy", **FP32[name], **options}


def allow_float16() -> None:
    """Allow float16 on a CPU without float16 instructions, where torch computes the same results more slowly."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def prepared(strategy: Mapping[str, Any], folder: Path, **changes: Any) -> BaseStrategy:
    """Return a strategy that is prepared to train the model of these tests."""
    if "fp16" in strategy:
        allow_float16()
    built: BaseStrategy = STRATEGIES.build(
        {
            "work_dir": folder,
            "env_kwargs": {"randomness": {"seed": 0}},
            "log_kwargs": {"log_level": changes.pop("log_level", "ERROR")},
            **strategy,
        }
    )
    try:
        built.prepare(
            changes.get("model", {"type": Gpt}),
            optim_wrapper=changes.get("optim", OPTIM),
            param_scheduler=changes.get("schedule", SCHEDULE),
            compile=changes.get("compile", False),
            dispatch_kwargs={
                "epoch_length": EPOCH,
                "max_iters": changes.get("max_iters", EPOCH),
                "train_micro_batch_size_per_gpu": GLOBAL_BATCH // built.dp_size,
            },
        )
    except BaseException:
        built.close()
        raise
    return built


def go(
    strategy: Mapping[str, Any],
    folder: Path,
    *,
    start: int = 0,
    stop: int = EPOCH,
    resume: Path | None = None,
    load: Path | None = None,
    found: Path | None = None,
    save: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train from ``start`` to ``stop``; return the recorded values, with losses averaged over ranks.

    Args:
        strategy: its configuration.
        folder: the work directory.
        start: the first iteration.
        stop: the iteration to stop before.
        resume: a checkpoint that is resumed before.
        load: a checkpoint whose weights are loaded before.
        found: where the state is saved at ``start``.
        save: where the state is saved at ``stop``.
        changes: other models, optimizers, schedules and so on.
    """
    with warnings.catch_warnings():
        # Ignore DeepSpeed's warnings and those that it causes in torch.
        warnings.simplefilter("ignore")
        run = prepared(strategy, folder, **changes)
        try:
            if resume is not None:
                run.resume(resume)
            if load is not None:
                run.load_checkpoint(load)
            if found is not None:
                run.save_checkpoint(found, extra_ckpt={"meta": {"iter": start}})
            seen = _train(run, start, stop)
            if save is not None:
                run.save_checkpoint(save, extra_ckpt={"meta": {"iter": stop}})
            return seen
        finally:
            run.close()


def _train(strategy: BaseStrategy, start: int, stop: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"losses": [], "rates": [], "norms": [], "others": []}
    for step in iterations(strategy, Sentences(), start, stop, global_batch=GLOBAL_BATCH):
        seen["rates"].append(step.rates)
        seen["losses"].append(step.mean_loss)
        seen["others"] += [value.item() for name, value in step.outputs.items() if name != "loss"]
        if step.updated:
            seen["norms"].append(step.grad_norm)
    optim = strategy.optim_wrapper
    return {**seen, "updates": optim.num_steps_applied, "attempts": optim.num_steps_attempted}


def state_in(checkpoint: Path) -> dict[str, Any]:
    """Return the tensors and numbers of a checkpoint that every strategy must agree on, by name."""
    tree = CheckpointLoader.load_checkpoint(checkpoint)
    parts = {"state_dict": tree["state_dict"], "optimizer": tree["optimizer"], "schedules": tree["param_schedulers"]}
    return dict(_leaves(parts, ""))


def _leaves(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}/{key}")]
    if isinstance(node, list | tuple):
        return [leaf for place, value in enumerate(node) for leaf in _leaves(value, f"{path}/{place}")]
    return [(path, node.clone() if isinstance(node, torch.Tensor) else node)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of values that differ in any bit or exist on only one side."""
    return sorted(
        name for name in {*one, *other} if name not in one or name not in other or not _equal(one[name], other[name])
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
