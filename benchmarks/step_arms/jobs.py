"""The training jobs of the benchmark: models, data and settings that all engines share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

__all__ = ["ALL_JOBS", "GROWTH_JOBS", "JOBS", "LOG_INTERVAL", "SCHEDULE_STEPS", "Job", "Rows", "make_loader", "network"]

# More samples than any measurement needs, so that no epoch ends while it is measured.
_SAMPLES: Final = 1 << 22
_ROWS: Final = 4096
_TOKENS: Final = 128
_EXAMPLES: Final = Path(__file__).parents[2] / "examples"
LOG_INTERVAL: Final = 50
# The learning rate follows a cosine with this half period, in updates.
SCHEDULE_STEPS: Final = 1_000_000


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
class Repeated(Dataset[Any]):
    """The samples of a dataset again and again."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return _SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self._samples[index % len(self._samples)]


def digits() -> Dataset[Any]:
    """Return the training images and labels of ``examples/mnist``."""
    data = _example("mnist", "digits").Digits(held_out=False)
    return Repeated([data[index] for index in range(len(data))])


def digit_network() -> nn.Module:
    """Return the network of ``examples/mnist/config.py``."""
    augment = _example("mnist", "digits").RandomAffine()
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(augment, *convolutions, nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 7 * 7, 10))


def sentences() -> Dataset[Any]:
    """Return inputs and targets of 128 tokens from the text of ``examples/gpt``."""
    data = _example("gpt", "king_james").KingJames(length=_TOKENS, held_out=False)
    full = [tokens for tokens in data.sequences if len(tokens) == _TOKENS + 1]
    return Repeated([(tokens[:-1], tokens[1:]) for tokens in full])


@final
class LanguageNetwork(nn.Module):
    """The model of ``examples/gpt``, with logits of shape [N, V, T]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt = _example("gpt", "gpt").Gpt(tokens=67, length=_TOKENS, width=128, blocks=4, heads=4)
        self.gpt.init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.gpt(tokens)
        return logits.transpose(1, 2)


def language_network() -> nn.Module:
    """Return the model of ``examples/gpt``, at a smaller size."""
    return LanguageNetwork()


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
        hooks: the number of additional hooks that run after every iteration.
        names: the number of additional values to log.
        optimizer: the optimizer.
        options: its options. All engines use the implementation that Stratagem selects by default: the fused one, except for the
            tensors of FSDP, which it does not support.
        draws: whether the data or the model draws random numbers, so that the engines do not train the same weights.
        block: the number of iterations in a block.
        weighted: whether the mean over ranks is weighted by the number of targets, as is Stratagem's default for cross entropy.
    """

    about: str
    dataset: Callable[[], Dataset[Any]] = Rows
    model: Callable[[], nn.Module] = network
    batch_size: int = 8
    accumulation: int = 1
    clip: float | None = None
    workers: int = 0
    ranks: int = 1
    shards: bool = False
    weighted: bool = False
    hooks: int = 0
    names: int = 0
    optimizer: type[Optimizer] = SGD
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9, "fused": True})
    draws: bool = False
    block: int = 50

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model."""
        return self.optimizer(model.parameters(), **self.options)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The optimizer as an entry of a configuration."""
        return {"type": self.optimizer.__name__, **self.options}


JOBS: Final[dict[str, Job]] = {
    "dataset": Job(about="a Dataset with __getitem__"),
    "tensors": Job(about="a TensorDataset", dataset=tensor_rows),
    "accumulation": Job(about="accumulation over 4 batches, clipping by norm", accumulation=4, clip=1.0),
    "augmentation": Job(
        about="a Dataset that draws from torch and NumPy", dataset=lambda: Rows(noise=True), draws=True
    ),
    "workers": Job(about="a Dataset, 2 data workers", workers=2),
    "ddp": Job(about="DDP, 2 gloo ranks", ranks=2),
    "ddp-weighted": Job(about="DDP, 2 gloo ranks, weighted by the number of targets", ranks=2, weighted=True),
    "fsdp": Job(
        about="FSDP, 2 gloo ranks", ranks=2, shards=True, options={"lr": 0.05, "momentum": 0.9, "foreach": True}
    ),
    "mnist": Job(
        about="a CNN for MNIST with 20,000 parameters, batch 32, AdamW, random affine transforms",
        dataset=digits,
        model=digit_network,
        batch_size=32,
        optimizer=AdamW,
        options={"lr": 2e-3, "weight_decay": 0.01, "fused": True},
        draws=True,
        block=10,
    ),
    "gpt": Job(
        about="a GPT with 800,000 parameters, batch 8 of 128 tokens, AdamW, clipping by norm",
        dataset=sentences,
        model=language_network,
        clip=1.0,
        optimizer=AdamW,
        options={"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True},
        block=4,
    ),
}
# What `growth.py` measures, for Stratagem only.
GROWTH_JOBS: Final[dict[str, Job]] = {
    **{f"hooks-{count}": Job(about=f"{count} additional hooks", hooks=count) for count in (0, 10, 100, 1_000)},
    **{f"names-{count}": Job(about=f"{count} additional values to log", names=count) for count in (0, 10, 100, 1_000)},
}
ALL_JOBS: Final = {**JOBS, **GROWTH_JOBS}


def make_loader(job: Job, rank: int = 0) -> DataLoader[Any]:
    """Return the loader that a user would write."""
    dataset: Any = job.dataset()
    if job.ranks > 1:
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, job.ranks, rank, shuffle=False)
        return DataLoader(dataset, job.batch_size, sampler=sampler, num_workers=job.workers)
    return DataLoader(dataset, job.batch_size, num_workers=job.workers)


def _example(folder: str, module: str) -> Any:
    """Import a module of an example."""
    if str(_EXAMPLES / folder) not in sys.path:
        sys.path.append(str(_EXAMPLES / folder))
    return importlib.import_module(module)
