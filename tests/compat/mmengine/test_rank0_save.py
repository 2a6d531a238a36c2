"""Hooks of users save checkpoints on rank 0 only, as in MMEngine, whose ``save_checkpoint`` is not collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from stratagem.compat.mmengine.dist import is_main_process, master_only
from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.runner import Runner
from tests.support.ranks import Ranks


class Model(BaseModel):
    """A linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        return {"loss": self.linear(torch.stack(inputs)).square().mean()}


class Numbers(Dataset[Any]):
    """Eight different samples."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {"inputs": torch.full((4,), index / 8)}


class SavesOnRank0(Hook):
    """Saves in the three forms that user code has, after the schedules were stepped."""

    priority = "VERY_LOW"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if is_main_process() and runner.iter == 1:
            runner.save_checkpoint(runner.work_dir, "condition.pth", by_epoch=False)
        runner.save_checkpoint(runner.work_dir, "all_ranks.pth", by_epoch=False)

    @master_only
    def after_train_epoch(self, runner: Any) -> None:
        runner.save_checkpoint(runner.work_dir, f"decorator_{runner.epoch}.pth")


def _runner(folder: Path, **arguments: Any) -> Runner:
    torch.manual_seed(0)
    return Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader={
            "dataset": Numbers(),
            "batch_size": 2,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "StepLR", "step_size": 1},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        launcher="pytorch",
        randomness={"seed": 3},
        **arguments,
    )


def _train_and_resume(folder: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the final weights of a run, and of one that resumed from a checkpoint that rank 0 saved after the first epoch."""
    finals = []
    whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
    saved = str(whole / "decorator_0.pth")
    for run in (
        {"folder": whole, "custom_hooks": [SavesOnRank0()]},
        {"folder": resumed, "load_from": saved, "resume": True},
    ):
        runner = _runner(**run)  # type: ignore[arg-type]
        runner.train()
        finals.append([each.detach().clone() for each in runner.model.module.parameters()])
    return finals[0], finals[1]


@pytest.mark.slow
def test_a_hook_that_saves_on_rank_0_only_does_not_hang(ranks: Ranks, tmp_path: Path) -> None:
    """All forms write complete checkpoints, and a run resumes from one of them with momentum, schedule and data position."""
    for whole, resumed in ranks.run(_train_and_resume, str(tmp_path)):
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    for name, position in {"condition": (0, 2), "all_ranks": (1, 4), "decorator_1": (2, 4)}.items():
        meta = torch.load(tmp_path / "whole" / f"{name}.pth", weights_only=True)["meta"]
        assert (meta["epoch"], meta["iter"]) == position, name
