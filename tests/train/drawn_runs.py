"""Runs for property tests: the model, the interruptions, and the recorded trace."""

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
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.checkpoint.convert.compare import compare
from stratagem.model import BaseModel
from stratagem.train import Hook
from tests.train.toys import VALIDATION, Samples, loader

How = Literal["SIGTERM", "hook", "model", "validation", "stop", "SIGKILL"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The settings of a small run.

    Attributes:
        samples: number of training samples.
        length: epochs, or iterations if ``by_epoch`` is False.
        window: iterations per update.
        val_interval: in epochs or iterations.
        save_interval: iterations between checkpoints.
        keeps: how many of the last checkpoints are kept, and whether the best are saved as well.
        minutes: between checkpoints by time, which replace those by iterations; None for those by iterations.
        in_background: whether a thread writes checkpoints.
        precision: float32, bfloat16 or float16; the last with a dynamic loss scale.
        average: whether weights are averaged.
        several: whether there are two optimizers, the second of which steps less often.
        weighted: whether samples have different weights.
        patience: of early stopping; None to disable it.
        workers: number of data workers.
        batch: micro-batch size per rank.
        draws: whether the model has dropout and batch statistics.
        augmented: whether samples have noise.
        launcher: the launcher of the ranks; None for one process.
    """

    samples: int = 13
    by_epoch: bool = True
    length: int = 3
    window: int = 1
    val_interval: int = 1
    save_interval: int = 2
    keeps: int = -1
    minutes: float | None = None
    in_background: bool = False
    precision: str = "float32"
    optimizer: str = "SGD"
    average: bool = False
    several: bool = False
    weighted: bool = False
    patience: int | None = None
    workers: int = 0
    batch: int = 2
    draws: bool = True
    augmented: bool = True
    launcher: str | None = None

    @property
    def iterations(self) -> int:
        """Iterations of the whole run in one process."""
        return self.length * -(-self.samples // 2) if self.by_epoch else self.length

    @property
    def optimizers(self) -> dict[str, Any]:
        if self.several:
            return {
                "constructor": "MultiOptimWrapperConstructor",
                "front": self._wrapper("SGD"),
                "back": self._wrapper("AdamW"),
            }
        cfg = self._wrapper(self.optimizer)
        if self.precision != "float32":
            cfg |= {"type": "AmpOptimWrapper", "dtype": self.precision}
        if self.precision == "float16":
            cfg["loss_scale"] = {"init_scale": 2.0**20, "growth_interval": 2}
        return cfg

    @property
    def schedules(self) -> Any:
        schedules: list[dict[str, Any]] = [
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 10},
            {"type": "ExponentialLR", "gamma": 0.95, "by": "step", "end": 99},
            {"type": "ReduceOnPlateauLR", "monitor": "accuracy", "rule": "greater", "patience": 0, "end": 99},
        ]
        if self.by_epoch:
            schedules.append({"type": "StepLR", "step_size": 1, "gamma": 0.8, "end": 99})
        return {"front": schedules, "back": schedules[:2]} if self.several else schedules

    def settings(self, folder: Path, hooks: Sequence[Hook]) -> dict[str, Any]:
        """Return the runner's arguments."""
        own: list[Any] = [*hooks]
        if self.average:
            own.append({"type": "EMAHook", "momentum": 0.3, "begin_iter": 3})
        if self.patience is not None:
            stopping = {"monitor": "accuracy", "rule": "greater", "patience": self.patience, "min_delta": 0.0}
            own.append({"type": "EarlyStoppingHook", **stopping})
        data = Augmented(self.samples) if self.augmented else Samples(self.samples)
        saving = {
            "by_epoch": False,
            "interval": self.save_interval,
            "save_last": False,
            "max_keep_ckpts": self.keeps,
            "async_save": self.in_background,
            "save_best": None if self.keeps < 0 else "accuracy",
        }
        if self.minutes is not None:
            saving = {"interval": -1, "save_last": False, "every_minutes": self.minutes, "keep_timed": 1}
        train_cfg = {"max_epochs": self.length} if self.by_epoch else {"by_epoch": False, "max_iters": self.length}
        return {
            "model": {"type": Pair if self.several else Net, "weighted": self.weighted, "draws": self.draws},
            "work_dir": folder,
            "experiment_name": "drawn",
            "strategy": "SingleDeviceStrategy" if self.launcher is None else "DDPStrategy",
            "launcher": self.launcher,
            "train_dataloader": loader(dataset=data, batch_size=self.batch, num_workers=self.workers),
            "train_cfg": {**train_cfg, "val_interval": self.val_interval},
            "optim_wrapper": self.optimizers,
            "param_scheduler": self.schedules,
            **VALIDATION,
            "default_hooks": {
                "runtime_info": None,
                "logger": None,
                "checkpoint": saving,
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
    """The point at which a run is interrupted: in or after an iteration, counted from 1 over the whole run, and the rank."""

    iteration: int
    how: How
    rank: int | None = None


class Augmented(Samples):
    """Samples with noise from all three generators."""

    def __getitem__(self, index: int) -> Any:
        features, label, number = super().__getitem__(index)
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return features + 0.1 * noise, label, number


class Net(BaseModel):
    """A model with two parts, optionally with dropout and running statistics."""

    def __init__(self, *, weighted: bool, draws: bool) -> None:
        super().__init__()
        between = [nn.BatchNorm1d(8, momentum=0.3), nn.Tanh(), nn.Dropout(0.3)] if draws else [nn.Tanh()]
        self.front = nn.Sequential(nn.Linear(4, 8), *between)
        self.back = nn.Linear(8, 3)
        self.weighted = weighted

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or predictions."""
        if len(inputs) == 1:
            # The last batch has a single sample, which has no batch statistics.
            self.front[1:2].eval()
        scores = self.back(self.front(inputs))
        self.front.train(self.training)
        if mode == "loss":
            losses = nn.functional.cross_entropy(scores.float(), classes, reduction="none")
            weights = weights_of(numbers) if self.weighted else torch.ones(len(numbers))
            loss = (losses * weights).sum() / weights.sum()
            return {"loss": loss, "weight": weights.sum()} if self.weighted else {"loss": loss}
        return {"preds": scores.float(), "target": classes}


def weights_of(numbers: Tensor) -> Tensor:
    """Return the weights of samples by index."""
    return 1.0 + numbers % 3


class Pair(Net):
    """Trains its first part in each iteration and its second part in every third; gradients accumulate in between."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("turn", torch.tensor(0))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Step one optimizer, and in some iterations the other."""
        for name in ("front", "back") if self.turn % 3 == 0 else ("front",):
            with optim_wrapper[name].optim_context(self):
                loss = self(*data, mode="loss")["loss"]
            optim_wrapper[name].update_params(loss)
        self.turn += 1
        return {"loss": loss.detach()}


class Trace(Hook):
    """Appends the exact results of each iteration and validation to a file."""

    # Before anything stops the run.
    priority = "VERY_HIGH"

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
    """An interruption of a run."""


class Stopper(Hook):
    """Interrupts a run according to a :class:`Stop`."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        # Either before the checkpoint of an iteration is saved, or after schedules have advanced.
        self.priority = "VERY_LOW" if stop.how == "stop" else "ABOVE_NORMAL"

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self._is_due(run, "model"):
            # Fail in the middle of the step, after random numbers were drawn, instead of here.
            run.strategy.unwrap_model().back.register_forward_pre_hook(_fail)

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
        if self.stop.how == "validation" and self.stop.rank in (None, run.rank) and run.iter >= self.stop.iteration:
            raise StopError

    def _is_due(self, run: Any, how: How) -> bool:
        here = self.stop.rank in (None, run.rank)
        return here and self.stop.how == how and run.iter + 1 == self.stop.iteration


def _fail(*_: Any) -> None:
    raise StopError


def train(drawn: Drawn, folder: Path, stop: Stop | None = None, *, resume: bool | Path = True) -> None:
    """Train until the interruption or the end; at the end, save the result as ``final``."""
    stoppers = [] if stop is None else [Stopper(stop)]
    trace = Trace(trace_of(folder, int(os.environ.get("RANK", "0"))))
    runner = Runner(**drawn.settings(folder, [trace, *stoppers]), resume=resume)
    try:
        runner.train()
        if stop is None:
            runner.run.save_checkpoint(folder / "final", runner.run.progress.here())
    except StopError:
        pass
    except SystemExit:
        if runner.interrupted is None:
            raise
    finally:
        runner.close()


def whole(drawn: Drawn, folder: Path) -> None:
    """Train without interruption and without intermediate checkpoints."""
    train(replace(drawn, save_interval=-1), folder)


def in_pieces(drawn: Drawn, folder: Path, stops: Sequence[Stop]) -> None:
    """Train with interruptions, resuming after each."""
    for stop in [*stops, None]:
        train(drawn, folder, stop)


def trace_of(folder: Path, rank: int = 0) -> Path:
    """Return the trace file of a rank of a run."""
    return folder.with_name(f"{folder.name}.rank{rank}.jsonl")


def lines_of(file: Path) -> list[tuple[str, Any]]:
    """Return the lines of a trace: the event and its result."""
    return [(what, values) for what, values in map(json.loads, file.read_text().splitlines())]


def differences(one: Path, other: Path, *, ranks: int = 1) -> list[str]:
    """Return the differences between an uninterrupted and an interrupted run, in their traces and final checkpoints."""
    found = []
    for rank in range(ranks):
        expected, lines = dict(lines_of(trace_of(one, rank))), lines_of(trace_of(other, rank))
        found += [f"{what}: {expected.get(what)} became {came}" for what, came in lines if expected.get(what) != came]
        found += [f"{what} is missing" for what in expected.keys() - dict(lines).keys()]
    return found + list(_differing_ends(one / "final", other / "final"))


def _differing_ends(one: Path, other: Path) -> Iterator[str]:
    trees = [CheckpointLoader.load_checkpoint(path) for path in (one, other)]
    for tree in trees:
        for name in ("time", "experiment_name", "run_id", "save_order", "lineage"):
            del tree["meta"][name]
    return (f"at the end: {difference}" for difference in compare(*trees))
