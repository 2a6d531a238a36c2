"""Run the same training twice: with a hand-written loop and with Stratagem.

A 16-32-4 network is trained on batches of 8 samples with SGD, momentum and a cosine schedule that steps each iteration. The
loss is read every 50 iterations. An iteration is so small that it consists almost entirely of overhead, so this is the worst
case for a training engine.
"""

from __future__ import annotations

import cProfile
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from stratagem import Runner
from stratagem.model import SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority

__all__ = ["CallCounter", "CpuClock", "Meter", "final_loss", "one_thread", "train_by_hand", "train_with_runner"]

BATCH_SIZE = 8
LOG_INTERVAL = 50
# Stratagem uses the fused implementation by default; set it for both loops so that they run the same optimizer code.
SGD_OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "fused": True}


class Meter(Protocol):
    """A measurement that starts just before the first batch is requested and stops after the last step."""

    def start(self) -> None:
        """Start measuring."""

    def stop(self) -> None:
        """Stop measuring."""


@final
class CpuClock:
    """Measures the CPU time of this process in seconds."""

    seconds = 0.0

    def start(self) -> None:
        self.seconds -= time.process_time()

    def stop(self) -> None:
        self.seconds += time.process_time()


@final
class CallCounter:
    """Counts calls of Python and built-in functions with cProfile."""

    def __init__(self) -> None:
        self.profile = cProfile.Profile()

    def start(self) -> None:
        self.profile.enable()

    def stop(self) -> None:
        self.profile.disable()

    @property
    def calls(self) -> int:
        """The number of calls."""
        # Do not count the call that disables the profiler.
        return sum(entry.callcount for entry in self.profile.getstats()) - 1


def train_by_hand(iterations: int, meter: Meter, *, listed: bool = False) -> nn.Module:
    """Train with a plain PyTorch loop; with ``listed``, take the batches from a list instead of a ``DataLoader``."""
    network, loss_function = _network(), nn.CrossEntropyLoss()
    optimizer = SGD(network.parameters(), **SGD_OPTIONS)
    scheduler = CosineAnnealingLR(optimizer, T_max=iterations)
    loader = _loader(iterations)
    batches = list(loader) if listed else loader
    network.train()
    meter.start()
    for index, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_function(network(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (index + 1) % LOG_INTERVAL == 0:
            loss.item()
    meter.stop()
    return network


def train_with_runner(iterations: int, meter: Meter, *, listed: bool = False) -> nn.Module:
    """Run the same training with ``Runner`` and its default hooks, which write their files as usual."""
    network = _network()
    loader = _loader(iterations)
    with tempfile.TemporaryDirectory() as folder, _quiet_terminal():
        runner = Runner(
            SupervisedModel(network, nn.CrossEntropyLoss()),
            folder,
            train_dataloader=_ListedLoader(loader) if listed else loader,
            optim_wrapper={"optimizer": {"type": "SGD", **SGD_OPTIONS}},
            param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False},
            train_cfg={"by_epoch": True, "max_epochs": 1},
            strategy="SingleDeviceStrategy",
            default_hooks={"logger": {"interval": LOG_INTERVAL}, "checkpoint": {"by_epoch": True}},
            custom_hooks=[_MeterHook(meter)],
            randomness={"seed": 0},
        )
        runner.train()
        runner.close()
    return network


@torch.no_grad()
def final_loss(network: nn.Module, iterations: int) -> float:
    """Return the loss of a trained network over all data; it must be equal for both loops."""
    inputs, targets = _data(iterations)
    return nn.functional.cross_entropy(network(inputs), targets).item()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def _data(iterations: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(iterations * BATCH_SIZE, 16, generator=generator)
    return inputs, inputs[:, :4].argmax(1)


def _loader(iterations: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_data(iterations)), batch_size=BATCH_SIZE)


@final
class _ListedLoader(DataLoader[Any]):
    """Yields the batches of another loader from a list, at no cost."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader.dataset, batch_size=loader.batch_size)
        self._batches = list(loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a plain iterator
        return iter(self._batches)


@final
class _MeterHook(Hook):
    """Measures the epoch, without the checkpoint saved after it."""

    priority = Priority.HIGHEST

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def before_train_epoch(self, run: Any) -> None:
        self._meter.start()

    def after_train_epoch(self, run: Any) -> None:
        self._meter.stop()


@contextmanager
def _quiet_terminal() -> Iterator[None]:
    """Redirect stderr to the null device, so that the terminal is not measured; log lines are still formatted and written."""
    with Path(os.devnull).open("w") as nothing, redirect_stderr(nothing):
        yield
