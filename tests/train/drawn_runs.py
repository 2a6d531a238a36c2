"""Runs that a property test draws: what is trained, where it is stopped and how, and the trace that it leaves."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from toys import VALIDATION, Samples, loader
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.checkpoint.compare import compare
from stratagem.model import BaseModel
from stratagem.train import Hook

How = Literal["SIGTERM", "hook", "model", "validation", "stop", "SIGKILL"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A small run.

    Attributes:
        samples: of the training data; a batch has two.
        length: epochs, or iterations where ``by_epoch`` is False.
        window: iterations of an update.
        val_interval: in epochs or iterations.
        save_interval: iterations from one checkpoint to the next.
        precision: float32, bfloat16 or float16; the last with a scale of the loss that moves.
        average: whether weights are averaged.
        several: whether there are two optimizers, the second of which steps at its own times.
        weighted: whether micro-batches count by their samples.
        patience: of early stopping; None for none.
        workers: that load the data.
    """

    samples: int = 13
    by_epoch: bool = True
    length: int = 3
    window: int = 1
    val_interval: int = 1
    save_interval: int = 2
    precision: str = "float32"
    optimizer: str = "SGD"
    average: bool = False
    several: bool = False
    weighted: bool = False
    patience: int | None = None
    workers: int = 0
    launcher: str | None = None

    @property
    def optimizers(self) -> dict[str, Any]:
        if self.several:
            return {"constructor": "MultiOptimWrapperConstructor", "front": self._wrapper("SGD"), "back": self._wrapper("AdamW")}
        cfg = self._wrapper(self.optimizer)
        if self.precision != "float32":
            cfg |= {"type": "AmpOptimWrapper", "dtype": self.precision}
        if self.precision == "float16":
            cfg["loss_scale"] = {"init_scale": 2.0**20, "growth_interval": 2}
        return cfg

    @property
    def schedules(self) -> Any:
        schedules: list[dict[str, Any]] = [
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10},
            {"type": "ExponentialLR", "gamma": 0.95, "by": "step"},
            {"type": "ReduceOnPlateauLR", "monitor": "accuracy", "rule": "greater", "patience": 0, "end": 99},
        ]
        if self.by_epoch:
            schedules.append({"type": "StepLR", "step_size": 1, "gamma": 0.8})
        return {"front": schedules, "back": schedules[:2]} if self.several else schedules

    def settings(self, folder: Path, hooks: Sequence[Hook]) -> dict[str, Any]:
        """Return the runner's arguments."""
        own: list[Any] = [*hooks]
        if self.average:
            own.append({"type": "EMAHook", "momentum": 0.3, "begin_iter": 3})
        if self.patience is not None:
            stopping = {"monitor": "accuracy", "rule": "greater", "patience": self.patience, "min_delta": 0.0}
            own.append({"type": "EarlyStoppingHook", **stopping})
        train_cfg = {"max_epochs": self.length} if self.by_epoch else {"by_epoch": False, "max_iters": self.length}
        return {
            "model": {"type": Pair} if self.several else {"type": Net, "weighted": self.weighted},
            "work_dir": folder,
            "experiment_name": "drawn",
            "strategy": "SingleDeviceStrategy" if self.launcher is None else "DDPStrategy",
            "launcher": self.launcher,
            "train_dataloader": loader(dataset=Augmented(self.samples), num_workers=self.workers),
            "train_cfg": {**train_cfg, "val_interval": self.val_interval},
            "optim_wrapper": self.optimizers,
            "param_scheduler": self.schedules,
            **VALIDATION,
            "default_hooks": {
                "runtime_info": None,
                "logger": None,
                "checkpoint": {"by_epoch": False, "interval": self.save_interval, "save_last": False},
            },
            "custom_hooks": own,
            "randomness": {"seed": 3},
            "log_level": "ERROR",
        }

    def _wrapper(self, name: str) -> dict[str, Any]:
        options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.02}}[name]
        return {"optimizer": {"type": name, **options}, "accumulative_counts": self.window}


@dataclass(frozen=True)
class Stop:
    """Where a run is stopped: in or after the iteration of a number from 1, counted over the whole run."""

    iteration: int
    how: How


class Augmented(Samples):
    """Samples with noise of all three generators."""

    def __getitem__(self, index: int) -> Any:
        features, label, number = super().__getitem__(index)
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return features + 0.1 * noise, label, number


class Net(BaseModel):
    """Two layers with dropout and running statistics, in two parts."""

    def __init__(self, *, weighted: bool = False) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Tanh(), nn.Dropout(0.3))
        self.back = nn.Linear(8, 3)
        self.weighted = weighted

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, weighted by what the samples' numbers say, or predictions."""
        # The last batch may be of one sample, of which there are no statistics.
        scores = self.back(self.front(inputs) if len(inputs) > 1 or not self.training else self._without_norm(inputs))
        if mode == "loss":
            losses = {"loss": nn.functional.cross_entropy(scores.float(), classes)}
            return {**losses, "weight": (1.0 + numbers % 3).sum()} if self.weighted else losses
        return {"preds": scores.float(), "target": classes}

    def _without_norm(self, inputs: Tensor) -> Tensor:
        linear, norm, *rest = self.front
        scaled = linear(inputs) * norm.weight + norm.bias
        for module in rest:
            scaled = module(scaled)
        return scaled


class Pair(Net):
    """Trains its front in each iteration, and its back in the first of three; what a backward pass leaves stays there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.tensor(0))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Step one optimizer, and perhaps the other."""
        for name in ("front", "back") if self.turn % 3 == 0 else ("front",):
            with optim_wrapper[name].optim_context(self):
                loss = self(*data, mode="loss")["loss"]
            optim_wrapper[name].update_params(loss)
        self.turn += 1
        return {"loss": loss.detach()}


class Trace(Hook):
    """Appends to a file what each iteration and each validation came to, to the last bit."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._rates = [rate.hex() for rates in run.optim_wrapper.get_lr().values() for rate in rates]

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._write(
            f"iteration {run.iter + 1}",
            [run.epoch, batch_idx, data_batch[2].tolist(), outputs["loss"].item().hex(), *self._rates],
        )

    def after_val_epoch(self, run: Any, metrics: Any = None) -> None:
        self._write(f"validation {run.iter}", metrics)

    def _write(self, what: str, values: Any) -> None:
        with self.file.open("a") as opened:
            opened.write(json.dumps([what, values]) + "\n")


class StopError(Exception):
    """What a piece of a run is stopped by."""


class Stopper(Hook):
    """Stops a run as a :class:`Stop` says."""

    # Before a checkpoint of the same iteration is saved.
    priority = "ABOVE_NORMAL"

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self._is_due(run, "model"):
            # Not from here: from the middle of the step, when random numbers were drawn.
            run.strategy.bare_model().back.register_forward_pre_hook(_fail)

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._is_due(run, "SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self._is_due(run, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_due(run, "hook"):
            raise StopError
        if self._is_due(run, "stop"):
            run.save_checkpoint(Path(run.work_dir) / f"iter_{run.iter + 1}", run.progress.after_this_iteration())
            run.progress.stop_training = True

    def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.stop.how == "validation" and run.iter >= self.stop.iteration:
            raise StopError

    def _is_due(self, run: Any, how: How) -> bool:
        return self.stop.how == how and run.iter + 1 == self.stop.iteration


def _fail(*_: Any) -> None:
    raise StopError


def train(drawn: Drawn, folder: Path, trace: Path, stop: Stop | None = None, *, hooks: Sequence[Hook] = ()) -> None:
    """Train until the stop, or to the end; then save what the run came to under ``final``."""
    stoppers = [] if stop is None else [Stopper(stop)]
    runner = Runner(**drawn.settings(folder, [Trace(trace), *stoppers, *hooks]), resume=True)
    try:
        runner.train()
        if stop is None:
            runner.run.save_checkpoint(folder / "final", runner.run.progress.here())
    except StopError:
        pass
    finally:
        runner.close()


def whole(drawn: Drawn, folder: Path) -> None:
    """Train without a stop, and without a checkpoint on the way."""
    train(replace(drawn, save_interval=-1), folder, folder.with_suffix(".jsonl"))


def differences(one: Path, other: Path, trace: Path | None = None) -> list[str]:
    """Return where an undisturbed run and one that was stopped differ: in any line of their traces, or in their ends."""
    expected = dict(_lines(one.with_suffix(".jsonl")))
    found = []
    seen = set()
    for what, values in _lines(trace or other.with_suffix(".jsonl")):
        seen.add(what)
        if expected.get(what) != values:
            found.append(f"{what}: {expected.get(what)} became {values}")
    found += [f"{what} is missing" for what in expected if what not in seen]
    return found + list(_differing_ends(one / "final", other / "final"))


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    return ((what, values) for what, values in map(json.loads, file.read_text().splitlines()))


def _differing_ends(one: Path, other: Path) -> Iterator[str]:
    trees = [CheckpointLoader.load_checkpoint(path) for path in (one, other)]
    for tree in trees:
        del tree["meta"]["time"]
    return (f"at the end: {difference}" for difference in compare(*trees))
