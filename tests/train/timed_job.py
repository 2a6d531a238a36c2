"""A training whose steps, data, saves and evaluations sleep, and that writes down when, as a truth to compare goodput with.

Usage: ``python -m tests.train.timed_job WORK_DIR LOG``. Each line of the log is a time, a word and a number.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stratagem import BaseMetric, BaseModel, Hook, Runner
from stratagem.train.run.context import Run

STEP_S, SAMPLE_S, SAVE_S, VALIDATION_S = 0.03, 0.01, 0.4, 0.5
ITERATIONS, SAVE_EVERY, VALIDATE_EVERY = 60, 20, 20

LOG = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if __name__ == "__main__" else -1


def note(word: str, number: int = 0) -> None:
    """Write a line, which survives a kill of this process."""
    os.write(LOG, f"{time.time()} {word} {number}\n".encode())


@contextmanager
def noted(word: str, number: int = 0) -> Any:
    """Write a line before and after a block."""
    note(f"{word}-begin", number)
    yield
    note(f"{word}-end", number)


class Samples(Dataset):
    """Samples that take a known time to load."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(SAMPLE_S)
        return torch.ones(1)


class Sleeper(BaseModel):
    """A model whose passes take a known time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        time.sleep(STEP_S if mode == "loss" else VALIDATION_S)
        return {"loss": self.layer(inputs).mean()} if mode == "loss" else self.layer(inputs)


class Nothing(BaseMetric):
    """A metric without a meaning."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0.0)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {"nothing": 0.0}


class Notes(Hook):
    """Write down the iterations and evaluations, and sleep in each save."""

    priority = 0  # the first of the hooks

    def before_train(self, run: Run) -> None:
        note("training", run.iter)

    def before_val(self, run: Run) -> None:
        note("validation-begin", run.iter)

    def after_val(self, run: Run) -> None:
        note("validation-end", run.iter)

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        note("step-begin", run.iter)

    def before_save_checkpoint(self, run: Run, checkpoint: Mapping[str, Any]) -> None:
        note("sleep-in-save", run.iter)
        time.sleep(SAVE_S)


class LastNotes(Hook):
    """Write down the end of each step, before the checkpoint is saved."""

    priority = 89

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        note("step-end", run.iter)


def main(work_dir: str) -> None:
    """Train, resuming from the newest checkpoint."""
    save = Run.save_checkpoint

    def noted_save(run: Run, path: Any, position: Any, **arguments: Any) -> None:
        with noted("save", position.iter):
            save(run, path, position, **arguments)

    Run.save_checkpoint = noted_save  # type: ignore[method-assign]
    loader: dict[str, Any] = {"batch_size": 1, "dataset": Samples()}
    runner = Runner(
        Sleeper(),
        work_dir,
        train_dataloader=loader,
        train_cfg={"by_epoch": False, "max_iters": ITERATIONS, "val_interval": VALIDATE_EVERY},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        val_dataloader={"batch_size": 1, "dataset": torch.utils.data.TensorDataset(torch.ones(1, 1))},
        val_cfg={},
        val_evaluator=Nothing(),
        default_hooks={"checkpoint": {"interval": SAVE_EVERY, "by_epoch": False}, "logger": {"interval": 10}},
        custom_hooks=[Notes(), LastNotes()],
        resume=True,
    )
    runner.train()
    note("end")


if __name__ == "__main__":
    main(sys.argv[1])
