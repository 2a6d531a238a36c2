"""Train a small model with all trackers: ``tracked_job.py FOLDER [kill AT | stop AT | fail AT | resume]``.

The run has 3 epochs of 8 iterations, a log line every 2 iterations, and a checkpoint and a validation after each epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from stratagem import Hook, Runner
from stratagem.model import SupervisedModel

SECRET = "hunter2hunter2"
TRACKERS = [
    {"type": "csv"}, {"type": "tensorboard"}, {"type": "wandb", "mode": "offline"}, {"type": "mlflow"}, {"type": "trackio"},
]  # fmt: skip
# On a busy machine, MLflow needs more than the default to create its database.
FLUSH_S = 200.0
# W&B and Trackio write with a delay of up to one second after the record has left the queue of the tracker.
DELAY_S = 5.0


class End(Hook):
    """Ends the run after an iteration."""

    def __init__(self, how: str, at: int) -> None:
        self.how, self.at = how, at

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.iter + 1 != self.at:
            return
        if self.how == "kill":
            # Trackers write in their threads, and some take long to start.
            while any(not delivery._queue.empty() for delivery in run.tracking._deliveries):
                time.sleep(0.1)
            time.sleep(DELAY_S)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise RuntimeError("bad luck")


def main(folder: str, how: str = "", at: str = "0") -> None:
    """Train."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(16, 2), torch.tensor([0, 1] * 8)
    network = torch.nn.Linear(2, 2)
    groups = [{"params": [network.weight]}, {"params": [network.bias], "lr": 0.125}]
    runner = Runner(
        model=SupervisedModel(network, torch.nn.CrossEntropyLoss()),
        work_dir=folder,
        cfg={"vars": {"api_token": SECRET, "width": 2}},
        # The data worker is forked while the threads of the trackers are running.
        train_dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=2, num_workers=1),
        optim_wrapper=torch.optim.SGD(groups, lr=0.5),
        train_cfg={"max_epochs": 3},
        val_dataloader=DataLoader(TensorDataset(inputs, targets), batch_size=4),
        val_cfg={},
        val_evaluator={"type": "Accuracy", "task": "multiclass", "num_classes": 2},
        default_hooks={"logger": {"interval": 2}, "checkpoint": {"interval": 1, "save_best": "accuracy"}},
        custom_hooks=[End(how, int(at))] if at != "0" else [],
        trackers=[{**tracker, "flush_s": FLUSH_S} for tracker in TRACKERS],
        resume=how == "resume",
    )
    try:
        runner.train()
    finally:
        runner.close()
    json.dump(dict(runner.run.metrics), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
