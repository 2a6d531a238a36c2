"""One training loop for the tests that compare strategies; each test collects the values that it compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratagem.data import build_dataloader
from stratagem.dist import all_reduce
from stratagem.strategies import BaseStrategy
from stratagem.train.hooks import ParamSchedulerHook


@dataclass(frozen=True)
class Iteration:
    """The batch of this rank, the learning rates before the step, and the outputs of the step.

    ``grad_norm`` is None if gradients are not clipped or if the iteration did not complete an accumulation window.
    """

    batch: Any
    rates: list[float]
    outputs: dict[str, Tensor]
    updated: bool
    grad_norm: float | None

    @property
    def mean_loss(self) -> float:
        """The loss averaged over all ranks (collective)."""
        loss = self.outputs["loss"].detach().float().clone()
        all_reduce(loss, "mean")
        return loss.item()


class _Run:
    """The attributes of a run that the schedule hook uses."""

    def __init__(self, strategy: BaseStrategy, start: int) -> None:
        self.param_schedulers = strategy.param_schedulers
        self.optim_wrapper = strategy.optim_wrapper
        self.max_epochs = None
        self.iter = start
        self.progress = self


def iterations(
    strategy: BaseStrategy,
    dataset: torch.utils.data.Dataset[Any],
    start: int,
    stop: int,
    *,
    global_batch: int,
    inputs: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[Iteration]:
    """Train iterations ``start`` to ``stop`` and yield each after its step.

    Args:
        strategy: the prepared strategy.
        dataset: the map-style dataset, which is shuffled in every epoch.
        start: the first iteration.
        stop: the iteration before which training ends.
        global_batch: the number of samples in an iteration over all ranks; it divides the length of the dataset.
        inputs: returns what the model gets from a batch.
    """
    assert isinstance(dataset, Sized)
    epoch_length = len(dataset) // global_batch
    loader = build_dataloader(
        {
            "dataset": dataset,
            "batch_size": global_batch // strategy.dp_size,
            "collate_fn": {"type": "default_collate"},
        },
        seed=strategy.seed,
        rank=strategy.dp_rank,
        world_size=strategy.dp_size,
        training=True,
    )
    schedules = ParamSchedulerHook()
    run: Any = _Run(strategy, start)
    schedules.before_train(run)
    optim = strategy.optim_wrapper
    updates = optim.num_steps_applied
    batches = loader.batches(start // epoch_length, start % epoch_length)
    for iteration in range(start, stop):
        if iteration % epoch_length == 0 and iteration != start:
            batches = loader.batches(iteration // epoch_length)
        batch = next(batches)
        rates = [rate for some in optim.get_lr().values() for rate in some]
        outputs = strategy.model.train_step(inputs(batch), optim_wrapper=optim)
        schedules.after_train_iter(run, iteration)
        run.iter += 1
        updated, updates = optim.num_steps_applied != updates, optim.num_steps_applied
        norm = optim.grad_norm if updated else None
        yield Iteration(batch, rates, outputs, updated, None if norm is None else norm.item())
