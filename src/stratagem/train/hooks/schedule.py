"""Advance the parameter schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from stratagem.errors import ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict, ParamScheduler
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["ParamSchedulerHook", "check_epoch_schedules"]


@final
@dataclass(slots=True)
class _ScheduledOptimizer:
    """The schedules that advance with the steps of one optimizer, and its step counters when they last advanced.

    ``since`` is the number of iterations of the run at the end of the last accumulation window.
    """

    name: str
    optim: BaseOptimWrapper
    by_iter: tuple[ParamScheduler, ...]
    by_step: tuple[ParamScheduler, ...]
    attempts: int
    updates: int
    since: int

    def advance(self, done: int) -> None:
        """Advance the schedules by the last step, which ended after ``done`` iterations; a skipped step does not count."""
        updates = self.optim.num_steps_applied
        if updates != self.updates:
            for scheduler in self.by_iter:
                scheduler.step(done - self.since)
            for scheduler in self.by_step:
                scheduler.step(updates - self.updates)
            self.updates = updates
        self.attempts = self.optim.num_steps_attempted
        self.since = done


def check_epoch_schedules(schedulers: Sequence[ParamScheduler], max_epochs: int | None) -> None:
    """Check that a run measured in iterations has no epoch-based schedules.

    Raises:
        ConfigValueError: if it has an epoch-based schedule.
    """
    by_epoch = [each for each in schedulers if each.unit == "epoch" and not each.need_val_args]
    if by_epoch and max_epochs is None:
        raise ConfigValueError(
            f"{type(by_epoch[0]).__name__} counts epochs, but this run counts iterations, so the schedule would never advance. "
            "Set by_epoch=False or convert_to_iter_based=True."
        )


@final
class ParamSchedulerHook(Hook):
    """Advance iteration-based and step-based schedules with each optimizer step, and epoch-based schedules after each epoch.

    A step advances an iteration-based schedule by the number of micro-batches in the step. The curve of such a schedule
    over the run therefore does not depend on gradient accumulation, and its value does not change between steps. Schedules
    that depend on metrics advance after each validation.
    """

    priority = Priority.LOW

    def __init__(self) -> None:
        self._optimizers: list[_ScheduledOptimizer] = []
        self._since: Mapping[str, int] = {}
        self._by_epoch: list[ParamScheduler] = []
        self._on_metrics: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        # Save `since`, which cannot be derived from the iteration, because the model decides when an optimizer steps.
        return {"since": {each.name: each.since for each in self._optimizers}} if self._optimizers else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._since = state_dict["since"]

    def before_train(self, run: Run) -> None:
        schedulers, optim = run.param_schedulers, run.optim_wrapper
        by_optim: dict[str, tuple[BaseOptimWrapper, list[ParamScheduler]]] = {}
        if isinstance(schedulers, dict) and isinstance(optim, OptimWrapperDict):
            by_optim = {name: (optim[name], some) for name, some in schedulers.items()}
        elif schedulers and isinstance(optim, BaseOptimWrapper):
            by_optim = {"": (optim, schedulers)}
        everything = [scheduler for _, some in by_optim.values() for scheduler in some]
        self._on_metrics = [scheduler for scheduler in everything if scheduler.need_val_args]
        self._by_epoch = [each for each in everything if each.unit == "epoch" and not each.need_val_args]
        optimizers = [_scheduled_optimizer(name, *pair, run.iter, self._since) for name, pair in by_optim.items()]
        self._optimizers = [each for each in optimizers if each.by_iter or each.by_step]
        self._since = {}
        check_epoch_schedules(self._by_epoch, run.max_epochs)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for scheduled in self._optimizers:
            if scheduled.optim.num_steps_attempted != scheduled.attempts:
                scheduled.advance(run.progress.iter + 1)

    def after_train_epoch(self, run: Run) -> None:
        for scheduler in self._by_epoch:
            scheduler.step()

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        for scheduler in self._on_metrics:
            scheduler.step(metrics)

    def after_train(self, run: Run) -> None:
        # A validation after training does not advance schedules.
        self._on_metrics = []


def _scheduled_optimizer(
    name: str, optim: BaseOptimWrapper, schedulers: Sequence[ParamScheduler], done: int, since: Mapping[str, int]
) -> _ScheduledOptimizer:
    return _ScheduledOptimizer(
        name=name,
        optim=optim,
        by_iter=tuple(each for each in schedulers if each.unit == "iter"),
        by_step=tuple(each for each in schedulers if each.unit == "step"),
        attempts=optim.num_steps_attempted,
        updates=optim.num_steps_applied,
        # If the checkpoint does not contain it, assume that all accumulation windows since the beginning of the run were
        # complete.
        since=since.get(name, done - done % optim.accumulative_counts),
    )
