"""Save the run as it goes on, and keep what is worth it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint import (
    Retention,
    RetentionTag,
    checkpoints_of_run,
    record_checkpoint_folder,
    release_checkpoint,
    remove_checkpoints,
)
from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.distributed import RankGroup
from stratagem.errors import ConfigValueError
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.best_scores import BestScores
from stratagem.train.run.context import INTERRUPTED, Run
from stratagem.train.run.distributed_timer import DistributedTimer
from stratagem.train.run.progress import Position
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["CheckpointHook"]


@final
class CheckpointHook(Hook):
    """Save after every ``interval`` epochs or iterations, and after the last.

    Old checkpoints go once a new one is durable. Only those of this run go, as their manifests say; what else lies in the
    folder, and what another run or a call of ``run.save_checkpoint`` has saved, stays.

    Args:
        interval: how often; -1 for never, apart from the last.
        by_epoch: whether it counts epochs or iterations.
        save_optimizer: whether the optimizer's state is saved.
        save_param_scheduler: whether the schedulers' state is saved.
        out_dir: the folder under which a folder named like the work directory is made; by default the work directory.
        max_keep_ckpts: how many are kept, the last; -1 for all. What an interruption saved counts among them.
        save_last: whether to save after the last epoch or iteration, whatever the interval.
        save_best: a metric, or several: after a validation that is the best so far by one of them, its checkpoint is
            saved as ``best_<metric>_epoch_<n>``, and the one before it goes. ``"auto"`` is the first metric.
        rule: whether ``"greater"`` or ``"less"`` values are better, for all metrics or for each; by default told from
            their names.
        greater_keys: what in a metric's name says that greater values are better, in the place of
            :data:`~stratagem.train.hooks.best_scores.GREATER_KEYS`.
        less_keys: what says that smaller ones are, in the place of :data:`~stratagem.train.hooks.best_scores.LESS_KEYS`.
        filename_tmpl: the name, with ``{}`` for the number of epochs or iterations done; one that ends in ``.pth``
            makes single files. By default ``epoch_{}`` or ``iter_{}``. Resuming does not depend on it.
        published_keys: parts of the last and the best checkpoints that are written to ``<name>-<digest>.pth`` after the
            training, such as ``"state_dict"``.
        save_begin: the number of epochs or iterations before which nothing is saved.
        keep_every: those whose number is a multiple of it are kept for good, beside the last.
        keep_best: how many are kept for each metric of ``save_best``.
        every_minutes: save as ``iter_<n>`` too when so much time has passed since the last save.
        async_save: wait for a copy in memory alone; a thread writes it while the training goes on. It takes as much
            memory again as what the rank saves. A failure is raised after the iteration in which it is known.
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
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | Sequence[str] | None = None,
        rule: str | Sequence[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        filename_tmpl: str | None = None,
        published_keys: str | Sequence[str] | None = None,
        save_begin: int = 0,
        keep_every: int | None = None,
        keep_best: int = 1,
        every_minutes: float | None = None,
        async_save: bool = False,
    ) -> None:
        if save_begin < 0:
            raise ConfigValueError(f"CheckpointHook: save_begin is {save_begin}; it cannot be negative.")
        if out_dir is not None and is_url(out_dir):
            raise ConfigValueError(
                f"CheckpointHook: out_dir={mask_text(os.fspath(out_dir))!r} is a URL, and a run finds and removes checkpoints in "
                "folders. Save to a folder, and publish what is worth it with strategy.save_checkpoint(url) or save_remote."
            )
        template = filename_tmpl or ("epoch_{}" if by_epoch else "iter_{}")
        _check_template(template)
        if max_keep_ckpts == 0 or max_keep_ckpts < -1:
            raise ConfigValueError(
                f"CheckpointHook: max_keep_ckpts is {max_keep_ckpts}; at least 1, or -1 to keep all, is due."
            )
        for name, count in (("keep_every", keep_every), ("keep_best", keep_best), ("every_minutes", every_minutes)):
            if count is not None and count <= 0:
                raise ConfigValueError(f"CheckpointHook: {name} is {count}; it must be above 0.")
        if not save_best and (rule is not None or greater_keys or less_keys or keep_best != 1):
            raise ConfigValueError(
                "CheckpointHook: rule, greater_keys, less_keys and keep_best speak of save_best, which is not given."
            )
        self._interval = interval
        self._by_epoch = by_epoch
        self._save_optimizer, self._save_param_scheduler = save_optimizer, save_param_scheduler
        self._out_dir = out_dir
        self._save_last = save_last
        self._template = template
        self._suffix = Path(template).suffix if Path(template).suffix in SINGLE_FILES else ""
        self._timed_template = f"iter_{{}}{self._suffix}"
        self._save_begin = save_begin
        self._best = BestScores(save_best, rule, greater_keys, less_keys, keep_best) if save_best else None
        self._published = [published_keys] if isinstance(published_keys, str) else list(published_keys or ())
        self._retention = Retention(
            groups=(template, self._timed_template, INTERRUPTED),
            last=None if max_keep_ckpts == -1 else max_keep_ckpts,
            every=keep_every,
            best=keep_best,
        )
        self._every_minutes = every_minutes
        self._async_save = async_save
        self._timer: DistributedTimer | None = None
        self._training = False
        # What this start went on from, until it has saved a checkpoint from which a run can go on.
        self._stands_on: set[Path] = set()

    def get_triggered_stages(self) -> list[str]:
        by_iter = not self._by_epoch or self._every_minutes is not None or self._async_save
        wanted = {
            "before_train": True,
            "after_train_epoch": self._by_epoch,
            "after_train_iter": by_iter,
            "after_val_epoch": self._best is not None,
            "after_train": True,
        }
        return [event for event, due in wanted.items() if due]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._best is None else self._best.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._best is not None:
            self._best.load_state_dict(state_dict)

    def before_train(self, run: Run) -> None:
        folder = Path(run.work_dir)
        self._folder = absolute(self._out_dir) / folder.name if self._out_dir else folder
        if self._out_dir:
            run.work_dir_locks.acquire(self._folder)
            # Before anything is saved there: what a run saves is found even if it is killed after its first save.
            RankGroup.of().run_on_rank0(lambda: record_checkpoint_folder(self._folder, Path(run.log_dir)))
        if self._async_save:
            run.checkpoint_writer.write_in_background()
        if self._timer is not None:
            # From a training that was broken off, as by a roll-back.
            self._timer.finish()
        if self._every_minutes is not None:
            self._timer = DistributedTimer(60 * self._every_minutes, distributed=run.world_size > 1)
        found = RankGroup.of().run_on_rank0(lambda: self._tidy_at_start(run))
        if self._best is not None:
            self._best.find_again(found)
        self._training = True

    def after_train_epoch(self, run: Run) -> None:
        position = run.progress.after_this_epoch()
        if self._due(position.epoch, run.max_epochs):
            self._save_regular(run, self._template, position.epoch, position)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        run.checkpoint_writer.check()
        done = run.progress.iter + 1
        timed = self._timer is not None and self._timer.due()
        if not self._by_epoch and self._due(done, run.max_iters):
            self._save_regular(run, self._template, done, run.progress.after_this_iteration())
        elif timed and not run.optim_wrapper.pending_micro_batches:
            self._save_regular(run, self._timed_template, done, run.progress.after_this_iteration())

    def after_val_epoch(self, run: Run, metrics: Mapping[str, Any] | None = None) -> None:
        # One outside of a training saves nothing.
        if self._best is None or not self._training:
            return
        number, unit = (run.epoch, "epoch") if self._by_epoch else (run.iter, "iter")
        for retention_tag in self._best.enter(metrics or {}, number):
            name = f"best_{retention_tag.metric.replace('/', '_')}_{unit}_{number}{self._suffix}"
            run.logger.info(
                "%s is among the best: %.6g, after %s %d", retention_tag.metric, retention_tag.score, unit, number
            )
            self._save(run, name, run.progress.here(), retention_tag)

    def after_train(self, run: Run) -> None:
        self._training = False
        if self._timer is not None:
            self._timer.finish()
        if self._published and run.interrupt.received is None:
            run.checkpoint_writer.wait()
            RankGroup.of().run_on_rank0(lambda: self._publish_parts(run))

    def _due(self, done: int, last: int | None) -> bool:
        regular = self._interval > 0 and done >= self._save_begin and done % self._interval == 0
        return regular or (self._save_last and done == last)

    def _save_regular(self, run: Run, template: str, number: int, position: Position) -> None:
        self._save(run, template.format(number), position, RetentionTag(group=template, number=number))

    def _save(self, run: Run, name: str, position: Position, retention_tag: RetentionTag) -> None:
        path = self._folder / name

        def tidy(rank_group: RankGroup) -> None:
            rank_group.run_on_rank0(lambda: self._remove_superfluous(run, path))

        run.save_checkpoint(
            path,
            position,
            save_optimizer=self._save_optimizer,
            save_param_scheduler=self._save_param_scheduler,
            retention_tag=retention_tag,
            then=tidy,
        )
        if self._timer is not None:
            self._timer.restart()

    def _tidy_at_start(self, run: Run) -> list[RetentionTag]:
        """Do what a run that was killed had no time for; return what the checkpoints on the disk were saved for."""
        saved = checkpoints_of_run(run.id, self._folder)
        # What the run was taken up from may be older than some that are damaged, and the only one that can be used.
        self._stands_on = {each.path for each in saved if each.iter == run.iter}
        self._remove_superfluous(run)
        return [each.retention_tag for each in saved]

    def _remove_superfluous(self, run: Run, new: Path | None = None) -> None:
        """Remove what retention does not keep; ``new`` was published just now."""
        if self._retention.last is None and self._best is None:
            return
        saved = checkpoints_of_run(run.id, self._folder)
        if any(each.path == new and each.finite for each in saved):
            self._stands_on = set()
        protected = self._stands_on if new is None else {new, *self._stands_on}
        remove_checkpoints([each.path for each in self._retention.select_removable(saved, protected)], run.logger)

    def _publish_parts(self, run: Run) -> None:
        saved = checkpoints_of_run(run.id, self._folder)
        last = [each for each in saved if each.retention_tag.group == self._template][-1:]
        best = [each for each in saved if each.retention_tag.metric]
        for each in (*last, *best):
            run.logger.info("Published %s", release_checkpoint(each.path, self._published))


def _check_template(template: str) -> None:
    """Refuse names of checkpoints that overwrite each other, or that resuming would not find.

    Raises:
        ConfigValueError: if it is such a name.
    """
    try:
        names = template.format(1), template.format(2)
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} cannot be filled with a number: {type(error).__name__}: {error}. "
            "Write {} for the number, or {:04d} with leading zeros."
        ) from error
    if names[0] == names[1]:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} names every checkpoint alike; it needs a {{}} for the number."
        )
    if Path(names[0]).name != names[0]:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} has a folder in it; it is a name. Choose the folder with out_dir."
        )
    if names[0].startswith("."):
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} gives hidden names, which are not taken for checkpoints. Leave the "
            "dot at its beginning out."
        )
