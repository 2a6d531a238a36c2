"""The overhead of an iteration of MMEngine's Runner in function calls, which is the same on every machine.

``tests/openmmlab/iteration_cost.py`` measures the time, and compares it with MMEngine.
"""

from __future__ import annotations

import cProfile
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.runner import Runner

WARM_UP = 20
ITERATIONS = 100


class CallCounter(Hook):
    """Counts the calls of Python and built-in functions in iterations after the first ones."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.profile = cProfile.Profile()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Start or stop the count."""
        if batch_idx + 1 == WARM_UP:
            self.profile.enable()
        elif batch_idx + 1 == WARM_UP + ITERATIONS:
            self.profile.disable()

    def calls(self) -> float:
        """Return the number of calls per iteration."""
        return sum(entry.callcount for entry in self.profile.getstats()) / ITERATIONS


class Regression(BaseModel):
    """Predicts a number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
        """Return the loss or the prediction."""
        output = self.network(x)
        return {"loss": ((output - y) ** 2).mean()} if mode == "loss" else output


def linear() -> nn.Module:
    """Return a linear layer for images of 4 x 4."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))


def with_batch_norm() -> nn.Module:
    """Return a network with ten convolutions, each with BatchNorm, for images of 4 x 4."""
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
    for _ in range(10):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 1))


def count_calls(network: Any, work_dir: str) -> float:
    """Train with the default hooks and a schedule; return the number of calls per iteration."""
    torch.set_num_threads(1)
    counter = CallCounter()
    Runner(
        model=Regression(network()),
        work_dir=work_dir,
        train_dataloader={
            "batch_size": 2,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": [(torch.randn(1, 4, 4), torch.randn(1)) for _ in range(2 * (WARM_UP + ITERATIONS + 1))],
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.001}},
        param_scheduler={"type": "LinearLR", "by_epoch": False, "start_factor": 0.1, "end": 150},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 50}},
        custom_hooks=[counter],
        log_level="WARNING",
    ).train()
    return counter.calls()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "calls_on_mmengine"), [(linear, 679), (with_batch_norm, 1215)])
def test_an_iteration_makes_fewer_calls_than_on_mmengine(tmp_path: Path, network: Any, calls_on_mmengine: int) -> None:
    """An iteration makes at least 150 calls less than the same training on MMEngine 0.10.7, where they were counted once."""
    # In the process of the tests, other tests can have changed what the loops call.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(count_calls, network, str(tmp_path)).result() <= calls_on_mmengine - 150
