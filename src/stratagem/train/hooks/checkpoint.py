"""Save checkpoints during training, and remove those that are no longer needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal, final

from torch.nn.parameter import is_lazy

from stratagem.checkpoint import (
    Retention,
    RetentionTag,
    checkpoints_of_run,
    record_checkpoint_folder,
    release_checkpoint,
    remove_checkpoints,
)
from stratagem.checkpoint.api import check_storable
from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.distributed import RankGroup
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.strategies.state.synced_buffers import iter_buffers
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.best_scores import BestScores, best_prefix
from stratagem.train.hooks.integers import require_integer
from stratagem.train.run.context import INTERRUPTED, Run
from stratagem.train.run.distributed_timer import DistributedTimer
from stratagem.train.run.progress import Position
from stratagem.utils import absolute, is_url, mask_text, named_parameters

__all__ = ["CheckpointHook"]

# The default of `every_minutes`: the interval, and the number of checkpoints by time that are kept.
_AUTO_MINUTES: Final = 15.0
_AUTO_KEPT: Final = 1
# The retention group of the checkpoints by time whose number `keep_timed` limits.
_TIMED: Final = "timed"


@final
class CheckpointHook(Hook):
    """Save a checkpoint every ``interval`` epochs or iterations, and at the end of training.

    Old checkpoints are removed once a new one is durable. Only checkpoints that this hook saved in this run are removed, as
    recorded in their manifests. Other files, checkpoints of other runs, and those saved by calling ``run.save_checkpoint``
    are kept.

    Args:
        interval: the number of epochs or iterations between checkpoints; -1 to only save the last one.
        by_epoch: whether ``interval`` counts epochs (True) or iterations (False).
        save_optimizer: whether to save the state of the optimizer.
        save_param_scheduler: whether to save the state of the schedulers.
        save_frozen: whether to save parameters that have been frozen since the model was built, such as the base weights of LoRA.
            If not, checkpoints contain their digests, and a run only resumes if its model has the same values.
        out_dir: a folder in which a subfolder with the name of the work directory is created for the checkpoints; by
            default, the work directory itself.
        max_keep_ckpts: the number of most recent checkpoints to keep; -1 for all. Checkpoints that were saved when the run was
            interrupted count as well.
        save_last: whether to save after the last epoch or iteration, regardless of the interval.
        save_best: a metric, or a list of metrics. After a validation with the best value so far, the checkpoint is saved as
            ``best_<metric>_epoch_<n>`` and the previous best one is removed. ``"auto"`` is the first metric that the
            validation returns. If the validation sets are named, so are their metrics: ``"<set>/<metric>"``.
        rule: whether ``"greater"`` or ``"less"`` values are better, for all metrics or for each one; by default inferred
            from their names.
        greater_keys: names, or parts of names, of metrics for which greater values are better; by default
            :data:`~stratagem.train.hooks.best_scores.GREATER_KEYS`.
        less_keys: names, or parts of names, of metrics for which smaller values are better; by default
            :data:`~stratagem.train.hooks.best_scores.LESS_KEYS`.
        filename_tmpl: the name of a checkpoint, with ``{}`` for the number of completed epochs or iterations; by default
            ``epoch_{}`` or ``iter_{}``. A name that ends in ``.pth`` creates single files. Resuming works with any name.
        published_keys: parts of a checkpoint, such as ``"state_dict"``. At the end of training, these parts of the last
            and the best checkpoints are written to ``<name>-<digest>.pth``.
        save_begin: the first epoch or iteration at which checkpoints are saved.
        keep_every: checkpoints whose number is a multiple of this are never removed.
        keep_best: the number of checkpoints to keep for each metric in ``save_best``.
        every_minutes: also save a checkpoint ``iter_<n>`` if this many minutes have passed since the last save; None to disable
            this. By default (``"auto"``), every 15 minutes, so that a killed run loses minutes even before its first epoch ends;
            never if the other options disable all checkpoints.
        keep_timed: a checkpoint that ``every_minutes`` saved is only kept while it is one of this many most recent checkpoints
            of the run, including all others. By default, 1 if ``every_minutes`` is ``"auto"``: the next checkpoint replaces it.
            If ``every_minutes`` is a number, the default is None: they are kept like the other checkpoints (``max_keep_ckpts``).
        async_save: save in the background: training only waits for a copy in host memory, which a thread writes. This needs
            as much additional memory as the part of the checkpoint that the rank saves. If a save fails, the error is
            raised after a later iteration.
    """

    priority = Priority.VERY_LOW

    def __init__(
        self,
        interval: int = -1,
        *,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        save_frozen: bool = True,
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
        every_minutes: float | Literal["auto"] | None = "auto",
        keep_timed: int | None = None,
        async_save: bool = False,
    ) -> None:
        require_integer("CheckpointHook", "save_begin", save_begin, least=0)
        if interval != -1:
            require_integer("CheckpointHook", "interval", interval, otherwise="-1 to only save the last one")
        if out_dir is not None and is_url(out_dir):
            raise ConfigValueError(
                f"CheckpointHook: out_dir={mask_text(os.fspath(out_dir))!r} is a URL, but a run can only list and remove "
                "checkpoints in a local folder. Save to a folder, and upload individual checkpoints with "
                "strategy.save_checkpoint(url) or save_remote."
            )
        template = filename_tmpl or ("epoch_{}" if by_epoch else "iter_{}")
        _check_template(template)
        if max_keep_ckpts != -1:
            require_integer("CheckpointHook", "max_keep_ckpts", max_keep_ckpts, otherwise="-1 to keep all")
        require_integer("CheckpointHook", "keep_best", keep_best)
        if keep_every is not None:
            require_integer("CheckpointHook", "keep_every", keep_every)
        minutes = _parse_minutes(every_minutes)
        if every_minutes == "auto" and interval == -1 and not save_last and not save_best:
            minutes = None
        if keep_timed is not None:
            require_integer("CheckpointHook", "keep_timed", keep_timed)
            if minutes is None:
                raise ConfigValueError("CheckpointHook: keep_timed needs every_minutes, which is disabled.")
        elif every_minutes == "auto":
            keep_timed = _AUTO_KEPT
        if not save_best and (rule is not None or greater_keys or less_keys or keep_best != 1):
            raise ConfigValueError(
                "CheckpointHook: rule, greater_keys, less_keys and keep_best need save_best, which is not set."
            )
        self._interval = interval
        self._by_epoch = by_epoch
        self._save_optimizer, self._save_param_scheduler = save_optimizer, save_param_scheduler
        self._save_frozen = save_frozen
        self._out_dir = out_dir
        self._save_last = save_last
        self._template = template
        self._suffix = Path(template).suffix if Path(template).suffix in SINGLE_FILES else ""
        self._timed_template = f"iter_{{}}{self._suffix}"
        self._save_begin = save_begin
        self._best = BestScores(save_best, rule, greater_keys, less_keys, keep_best) if save_best else None
        self.state_key = None if not save_best else save_best if isinstance(save_best, str) else ",".join(save_best)
        self._published = [published_keys] if isinstance(published_keys, str) else list(published_keys or ())
        self._retention = Retention(
            groups=(template, self._timed_template, INTERRUPTED),
            timed=None if keep_timed is None else (_TIMED, keep_timed),
            last=None if max_keep_ckpts == -1 else max_keep_ckpts,
            every=keep_every,
            best=keep_best,
        )
        self._timed_group = self._timed_template if keep_timed is None else _TIMED
        self._minutes = minutes
        self._async_save = async_save
        self._timer: DistributedTimer | None = None
        # Whether an iteration does nothing but look whether it is time to save.
        self._only_timed = by_epoch and not async_save
        # Whether checkpoints by time may exist that the next save replaces.
        self._replaces_timed = False
        self._training = False
        # The checkpoints that this session resumed from; they are kept until the session has saved one with finite weights.
        self._resumed_from: set[Path] = set()

    def get_triggered_stages(self) -> list[str]:
        by_iter = not self._by_epoch or self._minutes is not None or self._async_save
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

    @property
    def has_state(self) -> bool:
        return self._best is not None

    def _check_storable(self, run: Run) -> None:
        """Check before training that the model can be saved, so that a save does not fail later."""
        model = run.strategy.unwrap_model()
        buffers = {each.name: each.tensor for each in iter_buffers(model) if each.is_persistent}
        tensors = {name: value for name, value in {**named_parameters(model), **buffers}.items() if not is_lazy(value)}
        check_storable(tensors, self._template)

    def recognizes_state(self, state_dict: Mapping[str, Any]) -> bool:
        return self._best is not None and self._best.recognizes(state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._best is not None:
            self._best.load_state_dict(state_dict)

    @property
    def monitored(self) -> tuple[tuple[str, str], ...]:
        """Pairs of an option and a metric that it names."""
        return () if self._best is None else tuple(("CheckpointHook: save_best", name) for name in self._best.monitored)

    @property
    def saves_frozen(self) -> bool:
        """Whether checkpoints contain frozen parameters."""
        return self._save_frozen

    @property
    def saves_in_background(self) -> bool:
        """Whether a thread writes the checkpoints."""
        return self._async_save

    @property
    def best_values(self) -> Mapping[str, float]:
        """The best values of the metrics in ``save_best`` so far."""
        return {} if self._best is None else self._best.best()

    def for_dry_run(self) -> CheckpointHook:
        """Return a copy that saves the last checkpoint to the work directory."""
        copied = copy.copy(self)
        copied._save_last, copied._out_dir = True, None
        return copied

    def before_train(self, run: Run) -> None:
        folder = Path(run.work_dir)
        self._folder = absolute(self._out_dir) / folder.name if self._out_dir else folder
        if self._out_dir:
            run.work_dir_locks.acquire(self._folder)
            # Record the folder before the first save, so that its checkpoints are found even if the run is killed right
            # after that save.
            RankGroup.of().run_on_rank0(lambda: record_checkpoint_folder(self._folder, Path(run.log_dir)))
        self._check_storable(run)
        if not self._save_frozen and not run.strategy.can_omit_frozen:
            raise PlacementError(
                f"CheckpointHook: {type(run.strategy).__name__} cannot save checkpoints without frozen parameters. Omit "
                "save_frozen=False, or use SingleDeviceStrategy, DDPStrategy or FSDPStrategy."
            )
        # A checkpoint that is saved when the run is interrupted omits the same parameters.
        run.save_frozen = self._save_frozen
        if self._async_save:
            run.checkpoint_writer.write_in_background()
        if self._timer is not None:
            # This timer is left over from a training loop that was aborted, for example by a rollback.
            self._timer.close()
        if self._minutes is not None:
            self._timer = DistributedTimer(60 * self._minutes, distributed=run.world_size > 1)
            run.at_close.append(self._timer.close)
        saved_tags = RankGroup.of().run_on_rank0(lambda: self._clean_up_at_start(run))
        if self._best is not None:
            self._best.add_saved(saved_tags)
        self._training = True

    def after_train_epoch(self, run: Run) -> None:
        position = run.progress.after_this_epoch()
        if self._due(position.epoch, run.max_epochs):
            self._save_regular(run, self._template, position.epoch, position)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        timer = self._timer
        if timer is not None:
            timer.num_checks += 1
            if self._only_timed and not timer.is_requested and monotonic() < timer.deadline:
                return
        run.checkpoint_writer.check()
        done = run.progress.iter + 1
        timed = timer is not None and timer.due()
        if not self._by_epoch and self._due(done, run.max_iters):
            self._save_regular(run, self._template, done, run.progress.after_this_iteration())
        elif timed and not run.optim_wrapper.pending_micro_batches:
            self._save_timed(run, done)

    def after_val_epoch(self, run: Run, metrics: Mapping[str, Any] | None = None) -> None:
        # A validation outside of training does not save checkpoints.
        if self._best is None or not self._training:
            return
        number, unit = (run.epoch, "epoch") if self._by_epoch else (run.iter, "iter")
        best = self._best.update(metrics or {}, number)
        missing = self._best.missing(metrics or {})
        if missing:
            run.logger.warning(
                "CheckpointHook: the validation after %s %d returned no value for save_best=%s and is not considered for the "
                "best checkpoints.",
                unit, number, ", ".join(missing),
            )  # fmt: skip
        for retention_tag in best:
            name = f"{best_prefix(retention_tag.metric)}_{unit}_{number}{self._suffix}"
            run.logger.info(
                "%s = %.6g after %s %d is among the best values; saving a checkpoint.",
                retention_tag.metric,
                retention_tag.score,
                unit,
                number,
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

    def _save_timed(self, run: Run, number: int) -> None:
        tag = RetentionTag(group=self._timed_group, number=number)
        self._save(run, self._timed_template.format(number), run.progress.after_this_iteration(), tag)
        self._replaces_timed = self._timed_group == _TIMED

    def _save(self, run: Run, name: str, position: Position, retention_tag: RetentionTag) -> None:
        path = self._folder / name

        def clean_up(rank_group: RankGroup) -> None:
            rank_group.run_on_rank0(lambda: self._remove_old(run, path))

        run.save_checkpoint(
            path,
            position,
            save_optimizer=self._save_optimizer,
            save_param_scheduler=self._save_param_scheduler,
            retention_tag=retention_tag,
            then=clean_up,
        )
        if self._timer is not None:
            self._timer.restart()

    def _clean_up_at_start(self, run: Run) -> list[RetentionTag]:
        """Remove checkpoints that a killed run left behind; return the retention tags of the checkpoints of this run."""
        saved = checkpoints_of_run(run.id, self._folder)
        # The checkpoint that the run resumed from can be the only usable one if newer ones are damaged.
        self._resumed_from = {each.path for each in saved if each.iter == run.iter}
        self._replaces_timed = any(each.retention_tag.group == _TIMED for each in saved)
        self._remove_old(run)
        return [each.retention_tag for each in saved]

    def _remove_old(self, run: Run, new: Path | None = None) -> None:
        """Remove the checkpoints that the retention rules do not keep; ``new`` is the checkpoint that was just published."""
        if self._retention.last is None and self._best is None and not self._replaces_timed:
            return
        # Other checkpoints are looked up only if a removal depends on them.
        saved = checkpoints_of_run(run.id, self._folder, look_up=None if new is None else [new])
        if any(each.path == new and each.finite for each in saved):
            self._resumed_from = set()
        protected = self._resumed_from if new is None else {new, *self._resumed_from}
        removable = self._retention.find_removable(saved, run.id, self._folder, protected)
        remove_checkpoints([each.path for each in removable], run.logger)

    def _publish_parts(self, run: Run) -> None:
        saved = checkpoints_of_run(run.id, self._folder)
        last = [each for each in saved if each.retention_tag.group == self._template][-1:]
        best = [each for each in saved if each.retention_tag.metric]
        for each in (*last, *best):
            run.logger.info("Published %s", release_checkpoint(each.path, self._published))


def _parse_minutes(every_minutes: float | str | None) -> float | None:
    """Return the interval between checkpoints by time in minutes, or None to save none.

    Raises:
        ConfigValueError: if it is neither a positive number nor "auto".
    """
    if every_minutes is None or every_minutes == "auto":
        return _AUTO_MINUTES if every_minutes == "auto" else None
    if isinstance(every_minutes, bool) or not isinstance(every_minutes, int | float) or not every_minutes > 0:
        raise ConfigValueError(
            f"CheckpointHook: expected every_minutes > 0, got {every_minutes!r}. Use a number of minutes, 'auto' for "
            f"{_AUTO_MINUTES:g} minutes, or None to save no checkpoints by time."
        )
    return float(every_minutes)


def _check_template(template: str) -> None:
    """Check that a template yields distinct names that can be found when the run resumes.

    Raises:
        ConfigValueError: if the template is not suitable.
    """
    try:
        names = template.format(1), template.format(2)
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} cannot be formatted with a number: {type(error).__name__}: {error}. "
            "Use {} for the number, or {:04d} for leading zeros."
        ) from error
    if names[0] == names[1]:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} gives every checkpoint the same name; it needs a {{}} for the number."
        )
    if Path(names[0]).name != names[0]:
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} contains a folder; it must be a file name. Set the folder with out_dir."
        )
    if names[0].startswith("."):
        raise ConfigValueError(
            f"CheckpointHook: filename_tmpl={template!r} gives hidden names, which are not found as checkpoints. Remove "
            "the leading dot."
        )
