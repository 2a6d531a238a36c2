"""Move the schedules on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from stratagem.errors import ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict, ParamScheduler
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["ParamSchedulerHook", "refuse_epochs_without_end"]


@final
@dataclass(slots=True)
class _Follower:
    """The schedules of one optimizer that follow its updates, and what of it they have seen.

    ``since`` is after how many iterations of the run the optimizer's last window was complete.
    """

    name: str
    optim: BaseOptimWrapper
    by_iter: tuple[ParamScheduler, ...]
    by_step: tuple[ParamScheduler, ...]
    attempts: int
    updates: int
    since: int

    def follow(self, done: int) -> None:
        """Advance, after ``done`` iterations of the run, by what the last update consumed; a skipped one advances nothing."""
        updates = self.optim.num_steps_applied
        if updates != self.updates:
            for scheduler in self.by_iter:
                scheduler.step(done - self.since)
            for scheduler in self.by_step:
                scheduler.step(updates - self.updates)
            self.updates = updates
        self.attempts = self.optim.num_steps_attempted
        self.since = done


def refuse_epochs_without_end(schedulers: Sequence[ParamScheduler], max_epochs: int | None) -> None:
    """Refuse schedules by epoch where the run counts iterations.

    Raises:
        ConfigValueError: if there is such a schedule.
    """
    by_epoch = [each for each in schedulers if each.unit == "epoch" and not each.need_val_args]
    if by_epoch and max_epochs is None:
        raise ConfigValueError(
            f"{type(by_epoch[0]).__name__} counts epochs, but this run counts iterations, so it would never move. "
            "Give by_epoch=False, or convert_to_iter_based=True."
        )


@final
class ParamSchedulerHook(Hook):
    """Schedules by iteration and by step advance with the optimizer's updates, those by epoch after each epoch.

    An update over several micro-batches advances a schedule by iteration by all of them, so its curve over the run does
    not depend on accumulation, and nothing changes between updates. Schedules that look at metrics advance after each
    validation.
    """

    priority = Priority.LOW

    def __init__(self) -> None:
        self._followers: list[_Follower] = []
        self._since: Mapping[str, int] = {}
        self._by_epoch: list[ParamScheduler] = []
        self._on_metrics: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        # Iterations that have not advanced a schedule yet: an optimizer may step when its model's step says so.
        return {"since": {each.name: each.since for each in self._followers}} if self._followers else {}

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
        followers = [_follower(name, *pair, run.iter, self._since) for name, pair in by_optim.items()]
        self._followers = [each for each in followers if each.by_iter or each.by_step]
        self._since = {}
        refuse_epochs_without_end(self._by_epoch, run.max_epochs)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for follower in self._followers:
            if follower.optim.num_steps_attempted != follower.attempts:
                follower.follow(run.progress.iter + 1)

    def after_train_epoch(self, run: Run) -> None:
        for scheduler in self._by_epoch:
            scheduler.step()

    def after_val_epoch(self, run: Run, metrics: dict[str, Any] | None = None) -> None:
        for scheduler in self._on_metrics:
            scheduler.step(metrics)

    def after_train(self, run: Run) -> None:
        # A validation that is asked for after the training moves nothing.
        self._on_metrics = []


def _follower(
    name: str, optim: BaseOptimWrapper, schedulers: Sequence[ParamScheduler], done: int, since: Mapping[str, int]
) -> _Follower:
    return _Follower(
        name=name,
        optim=optim,
        by_iter=tuple(each for each in schedulers if each.unit == "iter"),
        by_step=tuple(each for each in schedulers if each.unit == "step"),
        attempts=optim.num_steps_attempted,
        updates=optim.num_steps_applied,
        # Where nobody has kept it, whole windows since the run's beginning tell.
        since=since.get(name, done - done % optim.accumulative_counts),
    )
