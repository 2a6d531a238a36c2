"""Measure the duration of iterations."""

from __future__ import annotations

from time import perf_counter
from typing import Any, final

from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["IterTimerHook"]


@final
class IterTimerHook(Hook):
    """Measure how long iterations take, and update ``run.step_timer``. The loop measures the time that it waits for batches."""

    priority = Priority.NORMAL

    def before_train_epoch(self, run: Run) -> None:
        run.step_timer.started = perf_counter()

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        timer = run.step_timer
        now = perf_counter()
        timer.seconds += now - timer.started
        timer.count += 1
        timer.started = now

    def after_val(self, run: Run) -> None:
        # Exclude the validation time from the next iteration.
        run.step_timer.started = perf_counter()
