"""The job with PyTorch Ignite: handlers step the schedule and print the loss. There are no handlers by default."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job, make_loader

__all__ = ["train"]


def train(job: Job, gate: Gate, rank: int) -> None:
    """Train until the gate stops; Ignite reads the rank from the environment."""
    if job.ranks > 1:
        idist.initialize("gloo")
    model = idist.auto_model(job.model())
    optimizer = job.make_optimizer(model)
    scheduler = CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)
    loss_function = nn.CrossEntropyLoss()
    if job.clip is None:
        trainer = create_supervised_trainer(
            model, optimizer, loss_function, gradient_accumulation_steps=job.accumulation
        )
    else:
        trainer = Engine(_clipping_step(job, model, optimizer, loss_function))
    trainer.add_event_handler(Events.ITERATION_STARTED, gate.tick)

    @trainer.on(Events.ITERATION_COMPLETED(every=job.accumulation))  # type: ignore[untyped-decorator]
    def step_schedule() -> None:
        scheduler.step()

    @trainer.on(Events.ITERATION_COMPLETED(every=LOG_INTERVAL))  # type: ignore[untyped-decorator]
    def log(engine: Engine) -> None:
        print(f"iteration {engine.state.iteration}: loss {engine.state.output:.4f}")

    trainer.run(make_loader(job, rank), max_epochs=1)


def _clipping_step(job: Job, model: nn.Module, optimizer: Any, loss_function: Any) -> Any:
    def step(engine: Engine, batch: Any) -> float:
        if (engine.state.iteration - 1) % job.accumulation == 0:
            optimizer.zero_grad()
        model.train()
        inputs, targets = batch
        loss = loss_function(model(inputs), targets)
        (loss / job.accumulation if job.accumulation > 1 else loss).backward()
        if engine.state.iteration % job.accumulation == 0:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip or 0.0)
            optimizer.step()
        value: float = loss.item()
        return value

    return step
