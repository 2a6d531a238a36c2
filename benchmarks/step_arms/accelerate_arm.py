"""The job with Accelerate: no trackers, as by default. The user writes the loop and prints the loss.

The schedule is not prepared, because a prepared schedule would take one step per rank and update.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job

__all__ = ["train"]


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops; Accelerate reads the rank from the environment."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.accumulation)
    network = job.model()
    optimizer: Any = job.make_optimizer(network)
    scheduler = CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)
    loader: Any = DataLoader(job.dataset(), job.batch_size, num_workers=job.workers)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    loss_function = nn.CrossEntropyLoss()
    model.train()
    for index, (inputs, targets) in enumerate(loader):
        gate.tick()
        with accelerator.accumulate(model):
            loss = loss_function(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and job.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
        if (index + 1) % LOG_INTERVAL == 0:
            accelerator.print(f"iteration {index + 1}: loss {loss.item():.4f}")
