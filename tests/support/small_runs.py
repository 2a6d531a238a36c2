"""Small models, data and training loops shared by tests of strategies, for one process and for ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.model import BaseModel
from stratagem.strategies import BaseStrategy, DDPStrategy, SingleDeviceStrategy


class Mlp(BaseModel):
    """Two linear layers for 4 features and 3 classes; ``init_weights`` counts its calls and reinitializes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.initialised = 0

    def init_weights(self) -> None:
        self.initialised += 1
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        outputs = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, targets)} if mode == "loss" else outputs


class Line(BaseModel):
    """``y = w * x`` with one weight, initially 2. The loss is the mean of ``w * x``, so its gradient is the mean of x."""

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        return {"loss": (self.weight * x).mean()} if mode == "loss" else self.weight * x


def digest(model: nn.Module) -> str:
    """Return a hash of every byte of the model's state."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


def make(
    kind: str, work_dir: Path | str, *, seed: int | None = 0, env: Mapping[str, Any] | None = None, **kwargs: Any
) -> BaseStrategy:
    """Return a strategy by its short name, with a seed."""
    env_kwargs = {"randomness": {"seed": seed}, **(env or {})}
    if kind == "single":
        return SingleDeviceStrategy(work_dir=work_dir, env_kwargs=env_kwargs, **kwargs)
    return DDPStrategy(work_dir=work_dir, env_kwargs=env_kwargs, **kwargs)


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    """Return a fixed batch for :class:`Mlp`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % 3


def train(strategy: BaseStrategy, batches: Sequence[Any]) -> list[float]:
    """Train on each batch, step the iteration-based schedules after each, and return the losses."""
    losses = []
    for data in batches:
        losses.append(strategy.model.train_step(data, optim_wrapper=strategy.optim_wrapper)["loss"].item())
        for scheduler in BaseStrategy.param_schedulers.get(strategy) or ():
            scheduler.step()
    return losses


class Lines(logging.Handler):
    """A handler that collects the log lines of a strategy."""

    def __init__(self, strategy: BaseStrategy) -> None:
        super().__init__()
        self.lines: list[str] = []
        strategy.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)
