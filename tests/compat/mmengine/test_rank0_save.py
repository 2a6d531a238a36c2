"""Hooks of users save checkpoints on rank 0 only, as in MMEngine, whose ``save_checkpoint`` is not collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from stratagem.compat.mmengine.dist import is_main_process, master_only
from stratagem.compat.mmengine.hooks import CheckpointHook, Hook
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.runner import Runner, collective_saves
from stratagem.errors import CheckpointError
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


class Decorated(CheckpointHook):
    """Saves on rank 0 only, with the decorator."""

    @master_only
    def after_train_epoch(self, runner: Any) -> None:
        super().after_train_epoch(runner)


class Conditional(CheckpointHook):
    """Saves on rank 0 only, under a condition in a method that the method of a stage calls."""

    def _save_checkpoint(self, runner: Any) -> None:
        if is_main_process():
            super()._save_checkpoint(runner)


class SavesMore(CheckpointHook):
    """Saves as the base class does, and once more in a different stage on rank 0 only."""

    @master_only
    def after_train(self, runner: Any) -> None:
        runner.save_checkpoint(runner.work_dir, "more.pth")


class FailsOnRank0(Hook):
    """Tries to save a sharded model on rank 0 only."""

    error: str | None = None

    @master_only
    def after_train_epoch(self, runner: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            runner.save_checkpoint(runner.work_dir, "some.pth")
        self.error = str(caught.value)


def _runner(folder: Path, **arguments: Any) -> Runner:
    torch.manual_seed(0)
    checkpoint = arguments.pop("checkpoint", {"type": "CheckpointHook", "interval": 1})
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
        default_hooks={"checkpoint": checkpoint},
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


def _train_with_subclasses(folder: str) -> dict[str, list[torch.Tensor]]:
    """Return the final weights of runs that save with subclasses of CheckpointHook, and of a run that resumes from each one."""
    finals = {}
    for kind in (Decorated, Conditional, SavesMore):
        work_dir = Path(folder, kind.__name__)
        for name, run in (
            ("whole", {"folder": work_dir}),
            ("resumed", {"folder": work_dir / "resumed", "load_from": str(work_dir / "epoch_1.pth"), "resume": True}),
        ):
            runner = _runner(checkpoint=kind(interval=1), **run)
            runner.train()
            finals[f"{kind.__name__} {name}"] = [each.detach().clone() for each in runner.model.module.parameters()]
    return finals


@pytest.mark.slow
def test_a_subclass_of_checkpoint_hook_that_saves_on_rank_0_only_does_not_hang(ranks: Ranks, tmp_path: Path) -> None:
    """Overridden methods may save on rank 0 only; runs resume from the checkpoints, which torch reads without code."""
    for finals in ranks.run(_train_with_subclasses, str(tmp_path)):
        assert len(finals) == 6
        expected = finals["Decorated whole"]
        for weights in finals.values():
            torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    for name, num_generators in {
        "Decorated/epoch_2": 1,
        "Conditional/epoch_2": 1,
        "SavesMore/epoch_2": 2,
        "SavesMore/more": 1,
    }.items():
        checkpoint = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert len(checkpoint["generators"]) == num_generators, name


def _save_sharded_on_rank_0(folder: str) -> str | None:
    """Return the error of a hook that saves a sharded model on rank 0 only; the training continues."""
    hook = FailsOnRank0()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective_saves, "_TIMEOUT_S", 1.0)
        _runner(Path(folder), custom_hooks=[hook], cfg={"strategy": {"type": "FSDPStrategy"}}).train()
    return hook.error


@pytest.mark.slow
def test_a_sharded_model_that_is_saved_on_rank_0_only_is_an_error_instead_of_a_hang(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The weights are on all ranks, so rank 0 reports which ranks did not save, and what to change."""
    first, second = ranks.run(_save_sharded_on_rank_0, str(tmp_path))
    assert first is not None
    assert "rank 0 saves, but rank 1 does not" in first
    assert "must be called on all ranks" in first
    assert second is None
    assert not (tmp_path / "some.pth").exists()


@pytest.mark.slow
def test_a_hook_that_saves_on_rank_0_only_does_not_hang(ranks: Ranks, tmp_path: Path) -> None:
    """All forms write complete checkpoints, and a run resumes from one of them with momentum, schedule and data position."""
    for whole, resumed in ranks.run(_train_and_resume, str(tmp_path)):
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    for name, position in {"condition": (0, 2), "all_ranks": (1, 4), "decorator_1": (2, 4)}.items():
        meta = torch.load(tmp_path / "whole" / f"{name}.pth", weights_only=True)["meta"]
        assert (meta["epoch"], meta["iter"]) == position, name
