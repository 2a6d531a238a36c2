"""The training jobs of the benchmark: models, data and settings that all engines share."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

__all__ = ["JOBS", "LOG_INTERVAL", "Job", "make_loader"]

# More samples than any measurement needs, so that no epoch ends while it is measured.
_SAMPLES: Final = 1 << 22
_ROWS: Final = 4096
LOG_INTERVAL: Final = 50


@final
class Rows(Dataset[tuple[Tensor, Tensor]]):
    """An ordinary dataset of 16 features and a class; with ``noise``, it draws from torch and NumPy for every sample."""

    def __init__(self, *, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(_ROWS, 16, generator=generator)
        self._targets = self._inputs[:, :4].argmax(1)
        self._noise = noise

    def __len__(self) -> int:
        return _SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = index % _ROWS
        inputs = self._inputs[row]
        if self._noise:
            inputs = inputs + torch.randn(16) * np.random.rand()
        return inputs, self._targets[row]


def tensor_rows() -> TensorDataset:
    """Return the rows as a ``TensorDataset``."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_ROWS * 64, 16, generator=generator)
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def network() -> nn.Module:
    """Return a 16-32-4 network, whose iterations consist almost entirely of overhead."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job.

    Attributes:
        about: one line for the table.
        dataset: returns the data.
        model: returns the network.
        batch_size: the number of samples per rank.
        accumulation: the number of batches per update.
        clip: the largest gradient norm; None for no clipping.
        workers: the number of data workers.
        ranks: the number of processes.
        shards: whether the ranks use FSDP instead of DDP.
        weighted: whether the mean over ranks is weighted by the number of targets, as is Stratagem's default for cross entropy.
    """

    about: str
    dataset: Callable[[], Sized] = Rows
    model: Callable[[], nn.Module] = network
    batch_size: int = 8
    accumulation: int = 1
    clip: float | None = None
    workers: int = 0
    ranks: int = 1
    shards: bool = False
    weighted: bool = False

    @property
    def sgd_options(self) -> dict[str, Any]:
        """The options of the optimizer. All engines use the implementation that Stratagem selects by default.

        That is the fused one, except for the tensors of FSDP, which it does not support.
        """
        return {"lr": 0.05, "momentum": 0.9, "foreach" if self.shards else "fused": True}


JOBS: Final[dict[str, Job]] = {
    "dataset": Job(about="a Dataset with __getitem__"),
    "tensors": Job(about="a TensorDataset", dataset=tensor_rows),
    "accumulation": Job(about="accumulation over 4 batches, clipping by norm", accumulation=4, clip=1.0),
    "augmentation": Job(about="a Dataset that draws from torch and NumPy", dataset=lambda: Rows(noise=True)),
    "workers": Job(about="a Dataset, 2 data workers", workers=2),
    "ddp": Job(about="DDP, 2 gloo ranks", ranks=2),
    "ddp-weighted": Job(about="DDP, 2 gloo ranks, weighted by the number of targets", ranks=2, weighted=True),
    "fsdp": Job(about="FSDP, 2 gloo ranks", ranks=2, shards=True),
}


def make_loader(job: Job, rank: int = 0) -> DataLoader[Any]:
    """Return the loader that a user would write."""
    dataset: Any = job.dataset()
    if job.ranks > 1:
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, job.ranks, rank, shuffle=False)
        return DataLoader(dataset, job.batch_size, sampler=sampler, num_workers=job.workers)
    return DataLoader(dataset, job.batch_size, num_workers=job.workers)
