"""Time the iterations."""

from __future__ import annotations

from time import perf_counter
from typing import Any, final

from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["IterTimerHook"]


@final
class IterTimerHook(Hook):
    """Adds up how long iterations take, and how long they wait for data; ``run.timing`` holds the sums."""

    priority = Priority.NORMAL

    def before_train_epoch(self, run: Run) -> None:
        run.timing.mark = perf_counter()

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        timing = run.timing
        timing.waited += perf_counter() - timing.mark

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        timing = run.timing
        now = perf_counter()
        timing.passed += now - timing.mark
        timing.count += 1
        timing.mark = now

    def after_val(self, run: Run) -> None:
        # Validation is not part of any training iteration.
        run.timing.mark = perf_counter()
