"""The job with Lightning Fabric: no logger and no callbacks, as by default. The user writes the loop and prints the loss."""

from __future__ import annotations

from lightning.fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job

__all__ = ["train"]


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops; Fabric reads the rank from the environment."""
    fabric = Fabric(accelerator="cpu", devices=job.ranks, strategy="ddp" if job.ranks > 1 else "auto")
    fabric.launch()
    network = job.model()
    model, optimizer = fabric.setup(network, job.make_optimizer(network))
    scheduler = CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)
    loader = fabric.setup_dataloaders(DataLoader(job.dataset(), job.batch_size, num_workers=job.workers))
    loss_function = nn.CrossEntropyLoss()
    model.train()
    for index, (inputs, targets) in enumerate(loader):
        gate.tick()
        updates = (index + 1) % job.accumulation == 0
        with fabric.no_backward_sync(model, enabled=not updates):
            loss = loss_function(model(inputs), targets)
            fabric.backward(loss / job.accumulation if job.accumulation > 1 else loss)
        if updates:
            if job.clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=job.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if (index + 1) % LOG_INTERVAL == 0:
            fabric.print(f"iteration {index + 1}: loss {loss.item():.4f}")
