"""A small run for the tests in this folder: 13 samples in batches of 2, so 7 batches per epoch."""

import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stratagem import Runner
from stratagem.model import BaseModel
from stratagem.train import EVENTS, Hook

SAMPLES = 13
EPOCH = 7


class Samples(Dataset):
    """Features of shape [4], a class from 0 to 2, and the index of the sample."""

    def __init__(self, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(length, 4, generator=generator)
        self.classes = torch.randint(3, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.features[index], self.classes[index], index


class Toy(BaseModel):
    """Two layers with dropout, so that results depend on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        scores = self.layers(inputs)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, classes)}
        return {"preds": scores, "target": classes, "numbers": numbers} if mode == "predict" else scores


class Recorder(Hook):
    """A hook that records the epoch, batch, samples, learning rate and loss of each iteration."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, tuple[int, ...], float, float]] = []
        self.metrics: list[tuple[int, Mapping[str, Any]]] = []

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._rate = run.optim_wrapper.get_lr()["lr"][0]

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        numbers = tuple(data_batch[2].tolist())
        self.rows.append((run.epoch, batch_idx, numbers, self._rate, outputs["loss"].item()))

    def after_val_epoch(self, run: Any, metrics: Any = None) -> None:
        self.metrics.append((run.iter, metrics))

    @property
    def rates(self) -> list[float]:
        return [row[3] for row in self.rows]


class EventLog(Hook):
    """A hook that records the name of each event."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def get_triggered_stages(self) -> list[str]:
        return list(EVENTS)

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(*_: Any, **__: Any) -> None:
            self.names.append(name)

        return note


class At(Hook):
    """A hook that runs an action after an iteration, counted from 1."""

    def __init__(self, iteration: int, action: Any) -> None:
        self.iteration = iteration
        self.action = action

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.iter + 1 == self.iteration:
            self.action(run)


def train_until_signal(runner: Runner) -> int | None:
    """Train to the end, or until a signal stops the run; return the requested exit code."""
    try:
        runner.train()
    except KeyboardInterrupt:
        assert runner.run.interrupt.passed_on
        return 128 + signal.SIGINT
    except SystemExit as error:
        assert runner.run.interrupt.passed_on
        return error.code
    return None


def stop(run: Any) -> None:
    """Stop the training."""
    run.progress.stop_training = True


def loader(length: int = SAMPLES, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a loader for the samples."""
    return {"batch_size": 2, "dataset": Samples(length), "collate_fn": {"type": "default_collate"}, **changes}


VALIDATION = {
    "val_dataloader": loader(5),
    "val_cfg": {},
    "val_evaluator": {"type": "Accuracy", "task": "multiclass", "num_classes": 3},
}
TEST = {key.replace("val", "test", 1): value for key, value in VALIDATION.items()}
TRAINING = {
    "train_dataloader": loader(),
    "train_cfg": {"by_epoch": True, "max_epochs": 3},
    "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
}
QUIET_HOOKS = {"runtime_info": None, "logger": None, "checkpoint": None}


def settings(**changes: Any) -> dict[str, Any]:
    """Return the runner's arguments for the small run, without files and console output."""
    return {
        "model": {"type": Toy},
        **TRAINING,
        "default_hooks": QUIET_HOOKS,
        "randomness": {"seed": 3},
        "log_level": "ERROR",
        "report": False,
        **changes,
    }
