"""Collect garbage at fixed iterations instead of whenever Python decides to."""

from __future__ import annotations

import gc
from typing import Any, final

from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.integers import require_integer
from stratagem.train.run.context import Run

__all__ = ["GarbageCollectionHook"]


@final
class GarbageCollectionHook(Hook):
    """Disable Python's automatic garbage collection during training, and collect every ``interval`` iterations instead.

    Python starts a collection after a number of allocations, at a different iteration on each rank, and all other ranks wait in
    the next all-reduce. With this hook, all ranks collect at the same time. Between two collections, only objects that are part
    of a reference cycle stay in memory; all other objects are freed immediately, as always.

    Args:
        interval: the number of iterations between collections.
    """

    priority = Priority.VERY_LOW

    def __init__(self, interval: int = 1000) -> None:
        require_integer("GarbageCollectionHook", "interval", interval)
        self._interval = interval
        self._was_enabled = False

    def before_train(self, run: Run) -> None:
        self._was_enabled = self._was_enabled or gc.isenabled()
        gc.collect()
        gc.disable()
        # A run that fails does not call after_train.
        run.at_close.append(self._restore)
        run.logger.info("Collecting garbage every %d iterations, at the same time on all ranks.", self._interval)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if (run.progress.iter + 1) % self._interval == 0:
            gc.collect()

    def after_train(self, run: Run) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
            self._was_enabled = False
