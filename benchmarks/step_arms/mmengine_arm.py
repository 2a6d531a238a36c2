"""The job with MMEngine's `Runner`, all default hooks and the default visualizer, which writes the losses to a file."""

from __future__ import annotations

import tempfile
from typing import Any, Final, final

import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job

__all__ = ["train"]

# The default wrapper would use a CUDA device.
_CPU_WRAPPER: Final = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops."""
    if job.ranks > 1:
        # The runner would select a CUDA device.
        dist.init_process_group("gloo")
    wrapper: dict[str, Any] = {"optimizer": job.optimizer_config, "accumulative_counts": job.accumulation}
    if job.clip is not None:
        wrapper["clip_grad"] = {"max_norm": job.clip}
    sampler = {"type": "DefaultSampler", "shuffle": False}
    with tempfile.TemporaryDirectory() as folder:
        Runner(
            _Model(job, gate),
            folder,
            train_dataloader={
                "dataset": job.dataset(),
                "batch_size": job.batch_size,
                "num_workers": job.workers,
                "sampler": sampler,
                "collate_fn": {"type": "default_collate"},
            },
            optim_wrapper=wrapper,
            # The schedule counts iterations.
            param_scheduler={
                "type": "CosineAnnealingLR",
                "by_epoch": False,
                "T_max": SCHEDULE_STEPS * job.accumulation,
            },
            train_cfg={"by_epoch": True, "max_epochs": 1},
            default_hooks={"logger": {"type": "LoggerHook", "interval": LOG_INTERVAL}},
            randomness={"seed": 0},
            launcher="pytorch" if job.ranks > 1 else "none",
            cfg={"model_wrapper_cfg": _CPU_WRAPPER} if job.ranks > 1 else None,
        ).train()


@final
class _Model(BaseModel):
    """The network with its loss."""

    def __init__(self, job: Job, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self.network = job.model()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> dict[str, Tensor]:
        """Return the loss."""
        self._gate.tick()
        return {"loss": self.loss(self.network(inputs), targets)}
