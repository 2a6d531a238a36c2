"""The job as a hand-written PyTorch loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job, make_loader

__all__ = ["train"]


def train(job: Job, gate: Gate, rank: int) -> None:
    """Train until the gate stops."""
    model = job.model()
    if job.ranks > 1:
        dist.init_process_group("gloo")
        model = _sharded(model) if job.shards else DistributedDataParallel(model)
    loss_function = nn.CrossEntropyLoss()
    optimizer = job.make_optimizer(model)
    scheduler = CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)
    loader = make_loader(job, rank)
    model.train()
    if job.accumulation > 1:
        _accumulate(job, gate, model, loss_function, optimizer, scheduler, loader)
    for index, (inputs, targets) in enumerate(loader):
        gate.tick()
        optimizer.zero_grad()
        loss = loss_function(model(inputs), targets)
        if job.weighted:
            _weighted_backward(job, model, loss, targets)
        else:
            loss.backward()
        if job.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        scheduler.step()
        if (index + 1) % LOG_INTERVAL == 0:
            print(f"iteration {index + 1}: loss {loss.item():.4f}")


def _weighted_backward(job: Job, model: nn.Module, loss: Tensor, targets: Tensor) -> None:
    count = (targets != -100).sum()
    total = count.double()
    reduction = dist.all_reduce(total, async_op=True)
    (loss * count).backward()
    reduction.wait()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_((job.ranks / total).float())


def _sharded(model: nn.Module) -> nn.Module:
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def _accumulate(
    job: Job, gate: Gate, model: nn.Module, loss_function: Any, optimizer: Any, scheduler: Any, loader: Any
) -> None:
    for index, (inputs, targets) in enumerate(loader):
        gate.tick()
        loss = loss_function(model(inputs), targets)
        (loss / job.accumulation).backward()
        if (index + 1) % job.accumulation == 0:
            if job.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if (index + 1) % LOG_INTERVAL == 0:
            print(f"iteration {index + 1}: loss {loss.item():.4f}")
