"""Runs of the small models on the device that the runner selects."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from tests.gpu.devices import ON_CPU
from tests.gpu.models import MODELS, SHAPES, Samples

ADAMW = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1}


def settings(folder: Path, name: str = "mlp", *, iterations: int = 12, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a runner: a model of ``MODELS``, batches of 8 samples, AdamW."""
    return {
        "model": MODELS[name](),
        "work_dir": folder,
        "train_dataloader": {
            "dataset": Samples(SHAPES[name]),
            "batch_size": 8,
            "collate_fn": {"type": "default_collate"},
        },
        "train_cfg": {"by_epoch": False, "max_iters": iterations},
        "optim_wrapper": {"optimizer": ADAMW},
        "randomness": {"seed": 3},
        "log_level": "ERROR",
        **changes,
    }


def trained(folder: Path, name: str = "mlp", **changes: Any) -> dict[str, Tensor]:
    """Train a run to its end; return the state of its model on the CPU."""
    runner = Runner(**settings(folder, name, **changes))
    try:
        model = runner.train()
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    finally:
        runner.close()


def checkpoint(path: Path) -> dict[str, Any]:
    """Return the tree of a checkpoint, on the CPU."""
    return dict(CheckpointLoader.load_checkpoint(path))


def in_new_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a process in which nothing has been computed on a GPU yet; return its result."""
    if ON_CPU:
        return function(*args, **kwargs)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result(timeout=240)
