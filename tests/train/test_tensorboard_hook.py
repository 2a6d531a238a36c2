"""TensorBoard shows the same values as the log."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from stratagem import Runner
from stratagem.model import SupervisedModel


def test_the_logged_values_are_tensorboard_scalars(tmp_path: Path) -> None:
    """The event file has the loss of every log line and the metric of every validation at their iterations."""
    data = DataLoader(TensorDataset(torch.randn(8, 2), torch.tensor([0, 1] * 4)), batch_size=2)
    network = torch.nn.Linear(2, 2)
    runner = Runner(
        model=SupervisedModel(network, torch.nn.CrossEntropyLoss()),
        work_dir=tmp_path,
        train_dataloader=data,
        optim_wrapper=torch.optim.SGD(network.parameters(), lr=0.5),
        train_cfg={"max_epochs": 2},
        val_dataloader=data,
        val_cfg={},
        val_evaluator={"type": "Accuracy", "task": "multiclass", "num_classes": 2},
        default_hooks={"logger": {"interval": 2}},
        custom_hooks=[{"type": "TensorboardHook"}],
    )
    runner.train()
    runner.close()
    events = EventAccumulator(str(Path(runner.strategy.log_dir) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("train/lr")] == [0.5] * 4
    assert [event.step for event in events.Scalars("val/accuracy")] == [4, 8]
