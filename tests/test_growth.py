"""What a long run accumulates, in counts. `benchmarks/growth.py` measures it over a million iterations."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stratagem import Runner
from stratagem.model import SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority

ITERATIONS_PER_EPOCH = 100
EARLY, LATE = 2, 20


class Counts(Hook):
    """Counts objects and open file descriptors after two epochs, when their checkpoints have been saved."""

    priority = Priority.LOWEST

    def __init__(self) -> None:
        self.objects = dict.fromkeys((EARLY, LATE), 0)
        self.descriptors = dict.fromkeys((EARLY, LATE), 0)

    def after_train_epoch(self, run: Any) -> None:
        epoch = run.epoch + 1
        if epoch in self.objects:
            gc.collect()
            self.objects[epoch] = len(gc.get_objects())
            self.descriptors[epoch] = len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    """Train for 2,000 iterations with all default hooks, a validation and a checkpoint after each epoch; return the counts."""
    torch.manual_seed(0)
    inputs = torch.randn(ITERATIONS_PER_EPOCH * 2, 4)
    data = TensorDataset(inputs, inputs.argmax(1))
    hook = Counts()
    runner = Runner(
        SupervisedModel(nn.Linear(4, 4), nn.CrossEntropyLoss()),
        tmp_path_factory.mktemp("growth"),
        train_dataloader={"dataset": data, "batch_size": 2},
        val_dataloader={"dataset": TensorDataset(inputs[:8], inputs[:8].argmax(1)), "batch_size": 4},
        val_cfg={},
        val_evaluator={"type": "Accuracy", "task": "multiclass", "num_classes": 4},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False},
        train_cfg={"by_epoch": True, "max_epochs": LATE},
        default_hooks={"checkpoint": {"interval": 1, "max_keep_ckpts": 1}, "logger": {"interval": 10}},
        custom_hooks=[hook],
    )
    try:
        runner.train()
    finally:
        runner.close()
    return hook


@pytest.mark.slow
def test_the_number_of_objects_does_not_grow_with_the_number_of_iterations(counts: Counts) -> None:
    """1,800 iterations with 180 log lines, 18 validations and 18 checkpoints do not leave one object per epoch behind."""
    assert counts.objects[EARLY] > 1000
    assert counts.objects[LATE] - counts.objects[EARLY] < LATE - EARLY


@pytest.mark.slow
def test_the_number_of_open_files_does_not_grow_with_the_number_of_iterations(counts: Counts) -> None:
    """Log lines, validations and checkpoints leave no file open."""
    assert counts.descriptors[EARLY] > 0
    assert counts.descriptors[LATE] == counts.descriptors[EARLY]
