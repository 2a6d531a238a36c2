"""Save the run as it goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

from stratagem.errors import ConfigValueError
from stratagem.train.hook import Hook
from stratagem.train.priority import Priority
from stratagem.train.progress import Position
from stratagem.train.run import Run

__all__ = ["CheckpointHook"]


@final
class CheckpointHook(Hook):
    """Save after every ``interval`` epochs or iterations, and after the last.

    Args:
        interval: how often; -1 for never, apart from the last.
        by_epoch: whether it counts epochs or iterations.
        save_optimizer: whether the optimizer's state is saved.
        save_param_scheduler: whether the schedulers' state is saved.
        out_dir: the folder under which a folder named like the work directory is made; by default the work directory.
        save_last: whether to save after the last epoch or iteration, whatever the interval.
        filename_tmpl: the name, with ``{}`` for the number of epochs or iterations done; one that ends in ``.pth``
            makes single files. By default ``epoch_{}`` or ``iter_{}``.
        save_begin: the number of epochs or iterations before which nothing is saved.
    """

    priority = Priority.VERY_LOW

    def __init__(
        self,
        interval: int = -1,
        *,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | os.PathLike[str] | None = None,
        save_last: bool = True,
        filename_tmpl: str | None = None,
        save_begin: int = 0,
    ) -> None:
        if save_begin < 0:
            raise ConfigValueError(f"CheckpointHook: save_begin is {save_begin}; it cannot be negative.")
        template = filename_tmpl or ("epoch_{}" if by_epoch else "iter_{}")
        if template.format(1) == template.format(2):
            raise ConfigValueError(
                f"CheckpointHook: filename_tmpl={template!r} names every checkpoint alike; it needs a {{}} for the number."
            )
        self._interval = interval
        self._by_epoch = by_epoch
        self._what = {"save_optimizer": save_optimizer, "save_param_scheduler": save_param_scheduler}
        self._out_dir = out_dir
        self._save_last = save_last
        self._template = template
        self._save_begin = save_begin

    def get_triggered_stages(self) -> list[str]:
        return ["before_train", "after_train_epoch" if self._by_epoch else "after_train_iter"]

    def before_train(self, run: Run) -> None:
        folder = Path(run.work_dir)
        self._folder = Path(self._out_dir) / folder.name if self._out_dir else folder

    def after_train_epoch(self, run: Run) -> None:
        position = run.progress.after_this_epoch()
        if self._due(position.epoch, run.max_epochs):
            self._save(run, position.epoch, position)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = run.progress.iter + 1
        if self._due(done, run.max_iters):
            self._save(run, done, run.progress.after_this_iteration())

    def _due(self, done: int, last: int | None) -> bool:
        regular = self._interval > 0 and done >= self._save_begin and done % self._interval == 0
        return regular or (self._save_last and done == last)

    def _save(self, run: Run, number: int, position: Position) -> None:
        path = self._folder / self._template.format(number)
        run.save_checkpoint(path, position, **self._what)
        run.logger.info("Saved checkpoint %s", path)
