"""The job with a ``Runner``, all default hooks and the default logging interval."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from typing import Any, final

import torch
from torch import nn

from step_arms.gate import Gate, Stop
from step_arms.jobs import SCHEDULE_STEPS, Job
from stratagem import Runner
from stratagem.model import BaseModel, SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority

__all__ = ["train"]


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops; the launcher of the runner reads the rank from the environment."""
    strategy: Any = "SingleDeviceStrategy"
    if job.ranks > 1:
        strategy = {"type": "FSDPStrategy", "wrap_policy": ["Linear"]} if job.shards else "DDPStrategy"
    wrapper: dict[str, Any] = {"optimizer": job.optimizer_config}
    if job.accumulation > 1:
        wrapper["accumulative_counts"] = job.accumulation
    if job.clip is not None:
        wrapper["clip_grad"] = {"max_norm": job.clip}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            _model(job),
            folder,
            train_dataloader={
                "dataset": job.dataset(),
                "batch_size": job.batch_size,
                "num_workers": job.workers,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
            },
            optim_wrapper=wrapper,
            param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False, "T_max": SCHEDULE_STEPS},
            train_cfg={"by_epoch": True, "max_epochs": 1},
            strategy=strategy,
            custom_hooks=[_GateHook(gate), *(_AfterHook() for _ in range(job.hooks))],
            randomness={"seed": 0},
            launcher="pytorch" if job.ranks > 1 else "none",
        )
        try:
            with suppress(Stop):
                runner.train()
        finally:
            runner.close()


@final
class _GateHook(Hook):
    """Counts iterations."""

    priority = Priority.HIGHEST

    def __init__(self, gate: Gate) -> None:
        self._tick = gate.tick

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._tick()


@final
class _AfterHook(Hook):
    """Runs after every iteration."""

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        pass


@final
class _ManyValues(BaseModel):
    """A model that returns values to log in addition to its loss."""

    def __init__(self, network: nn.Module, names: int) -> None:
        super().__init__()
        self.network = network
        self._values = {f"value_{number}": torch.tensor(float(number)) for number in range(names)}

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Return the loss and the values."""
        inputs, targets = args
        return {"loss": nn.functional.cross_entropy(self.network(inputs), targets), **self._values}


def _model(job: Job) -> nn.Module:
    if job.names:
        return _ManyValues(job.model(), job.names)
    return SupervisedModel(job.model(), nn.CrossEntropyLoss(), weight=None if job.weighted else False)
