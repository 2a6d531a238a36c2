"""The host never waits for the GPU between two log lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.optim import OptimWrapper
from stratagem.train import Hook, Priority
from tests.gpu.models import SHAPES, Samples, mlp
from tests.gpu.runs import ADAMW, settings

INTERVAL = 50
# The first iterations create handles of libraries and the state of the optimizer.
WARM_UP = 4
LOADER = {"dataset": Samples(SHAPES["mlp"]), "batch_size": 8, "collate_fn": {"type": "default_collate"}}


class RefuseSynchronization(Hook):
    """Makes torch raise an error if the host waits for the GPU, except in iterations that write a log line."""

    priority = Priority.HIGHEST

    def __init__(self) -> None:
        self.refused = 0

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter >= WARM_UP:
            set_mode("error")

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.refused += get_mode() == "error"
        if (run.iter + 1) % INTERVAL == 0:
            set_mode("default")

    def after_train_epoch(self, run: Any) -> None:
        set_mode("default")


_MODES = ("default", "warn", "error")
_mode_on_cpu = ["default"]


def set_mode(mode: str) -> None:
    """Set the mode of torch; without a GPU, only remember it."""
    _mode_on_cpu[:] = [mode]
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def get_mode() -> str:
    """Return the mode that was set last."""
    return _MODES[torch.cuda.get_sync_debug_mode()] if torch.cuda.is_available() else _mode_on_cpu[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim_wrapper": {"optimizer": ADAMW, "clip_grad": {"max_norm": 1.0}}},
        {"optim_wrapper": {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": ADAMW}},
        {"optim_wrapper": {"optimizer": ADAMW, "accumulative_counts": 2}},
        {"optim_wrapper": {"optimizer": {"type": "RMSprop", "lr": 1e-3}}},
        {"custom_hooks": [{"type": "EMAHook", "momentum": 0.1}]},
        {"param_scheduler": {"type": "CosineAnnealingLR", "by_epoch": False, "end": 110}},
        {"train_dataloader": {**LOADER, "num_workers": 1, "persistent_workers": True}},
        {"train_dataloader": {**LOADER, "device_prefetch": True}},
    ],
    ids=[
        "plain",
        "clipping",
        "bfloat16",
        "accumulation",
        "without fused kernel",
        "averaged weights",
        "schedule",
        "workers",
        "read ahead",
    ],
)
def test_the_host_does_not_wait_between_log_lines(
    changes: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """With the default hooks, only iterations with a log line synchronize, which are those after 50 and 100 iterations."""
    refuse = RefuseSynchronization()
    hooks = [*changes.pop("custom_hooks", []), refuse]
    runner = Runner(**settings(tmp_path, iterations=110, custom_hooks=hooks, **changes))
    runner.strategy.logger.setLevel("INFO")
    try:
        model = runner.train()
    finally:
        set_mode("default")
        runner.close()
    assert next(model.parameters()).device == device
    assert refuse.refused == 110 - WARM_UP


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}, {"clip_value": 0.1, "type": "value"}])
def test_an_update_does_not_wait(name: str, clip: dict[str, Any] | None, device: torch.device) -> None:
    """Backward pass, clipping, update and zeroing are enqueued without a synchronization."""
    model = mlp().to(device)
    optim = OptimWrapper(getattr(torch.optim, name)(model.parameters(), lr=1e-3), clip_grad=clip)
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in Samples(SHAPES["mlp"]).batches(8)]
    try:
        for index, (inputs, targets) in enumerate(batches):
            if index == WARM_UP:
                set_mode("error")
            optim.update_params(model(inputs, targets, mode="loss")["loss"])
    finally:
        set_mode("default")
    assert optim.num_steps_applied == len(batches)
