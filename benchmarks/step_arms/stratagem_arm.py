"""The job with a ``Runner``, all default hooks and the default logging interval."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from typing import Any, final

from torch import nn

from step_arms.gate import Gate, Stop
from step_arms.jobs import Job
from stratagem import Runner
from stratagem.model import SupervisedModel
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority

__all__ = ["train"]


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops; the launcher of the runner reads the rank from the environment."""
    strategy: Any = "SingleDeviceStrategy"
    if job.ranks > 1:
        strategy = {"type": "FSDPStrategy", "wrap_policy": ["Linear"]} if job.shards else "DDPStrategy"
    wrapper: dict[str, Any] = {"optimizer": {"type": "SGD", **job.sgd_options}}
    if job.accumulation > 1:
        wrapper["accumulative_counts"] = job.accumulation
    if job.clip is not None:
        wrapper["clip_grad"] = {"max_norm": job.clip}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            SupervisedModel(job.model(), nn.CrossEntropyLoss(), weight=None if job.weighted else False),
            folder,
            train_dataloader={
                "dataset": job.dataset(),
                "batch_size": job.batch_size,
                "num_workers": job.workers,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
            },
            optim_wrapper=wrapper,
            param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False, "T_max": 1_000_000},
            train_cfg={"by_epoch": True, "max_epochs": 1},
            strategy=strategy,
            custom_hooks=[_GateHook(gate)],
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
