"""Components of the test configuration: a reproducible dataset, its metric, and hooks that send Ctrl-C or fail."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stratagem.registry import DATASETS, HOOKS, METRICS
from stratagem.train import BaseMetric, Hook


@DATASETS.register_module()
class CornerSamples(Dataset):
    """Points in the plane, and the quadrant of each."""

    def __init__(self, length: int = 20) -> None:
        self.points = torch.randn(length, 2, generator=torch.Generator().manual_seed(0))
        self.quarters = (self.points > 0).long() @ torch.tensor([1, 2])

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.quarters[index]


@DATASETS.register_module()
class ChangingSamples(CornerSamples):
    """The same points, but every access changes them, so that training is not reproducible."""

    offset = 0.0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point, quarter = super().__getitem__(index)
        type(self).offset += 0.01
        return point + self.offset, quarter


@METRICS.register_module()
class Correct(BaseMetric):
    """The share of samples whose quadrant is predicted.

    Importing torchmetrics takes two seconds, and the tests start hundreds of processes with this configuration.
    """

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += (data_samples["preds"].argmax(1) == data_samples["target"]).tolist()

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}


@HOOKS.register_module()
class PressCtrlC(Hook):
    """A hook that sends SIGINT to this process after an iteration, counted from 1."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.iter + 1 == self.after:
            os.kill(os.getpid(), signal.SIGINT)


@HOOKS.register_module()
class FailOnce(Hook):
    """A hook that makes one rank fail after an iteration, counted from 1, but not after a restart."""

    def __init__(self, how: str, rank: int = 1, after: int = 7) -> None:
        self.how = how
        self.rank = rank
        self.after = after

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter + 1 != self.after or run.rank != self.rank or os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0":
            return
        Path("failed").write_text(str(os.getpid()))
        if self.how == "raise":
            raise ValueError("bad data on this rank")
        while self.how == "hang":
            time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, self.how))
