"""Checkpoints of a LoRA training with peft omit the base model and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem import ModelWithLoss, load_checkpoint
from stratagem.checkpoint import CheckpointLoader
from stratagem.errors import CheckpointMismatchError
from stratagem.storage import tree_bytes
from stratagem.train import Hook
from tests.foreign.jobs import peft_lora

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(300)]


class StopAt(Hook):
    """Stops after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        run.progress.stop_training = run.iter + 1 == self.iteration


def trained(folder: Path, *, save_frozen: bool = False, stop_at: int = 0, **options: Any) -> dict[str, Tensor]:
    """Train and return the weights."""
    runner, network = peft_lora.train(
        peft_lora.BATCH,
        work_dir=folder,
        default_hooks={"checkpoint": {"save_frozen": save_frozen}, "logger": None},
        custom_hooks=[StopAt(stop_at)],
        log_level="ERROR",
        **options,
    )
    runner.close()
    return dict(network.state_dict())


def test_adapters_are_saved_without_their_base_model(tmp_path: Path) -> None:
    """The weights after a resumption are those of an uninterrupted run, and another base model is rejected."""
    expected = trained(tmp_path / "whole", save_frozen=True)
    trained(tmp_path / "part", stop_at=6)
    result = trained(tmp_path / "part", resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in result.items())
    keys = set(CheckpointLoader.load_checkpoint(tmp_path / "part" / "epoch_2")["state_dict"])
    assert any("lora_A" in key for key in keys)
    assert not any("base_layer" in key for key in keys)
    assert tree_bytes(tmp_path / "part" / "epoch_2") < tree_bytes(tmp_path / "whole" / "epoch_2") / 2
    other = peft_lora.network()
    with torch.no_grad():
        next(each for name, each in other.named_parameters() if name.endswith("base_layer.weight")).add_(1e-3)
    with pytest.raises(CheckpointMismatchError, match=r"1 of them have other values.*base_layer\.weight"):
        load_checkpoint(ModelWithLoss(other), tmp_path / "part" / "epoch_2")
