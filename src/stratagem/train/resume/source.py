"""Restore a run from a checkpoint, or from its last checkpoint if the launcher restarted it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint import CheckpointInfo, has_averaged_weights, list_checkpoints
from stratagem.config import changed_values
from stratagem.data import EpochLoader
from stratagem.distributed import ProcessIdentity, RankGroup, all_gather_object
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.strategies.state.resuming import resume_newest
from stratagem.train.resume.relaunch import LaunchIdentity, find_restart_checkpoint
from stratagem.train.resume.tracked_sessions import adopt_tracking
from stratagem.train.run.context import Run
from stratagem.train.run.progress import Position
from stratagem.train.run.run_history import RunHistory
from stratagem.utils import mask_text

__all__ = ["ResumeSource", "restore_data_position"]

# Keys of the configuration that always differ in a resumed run.
_RESUMING = ("resume", "load_from", "resume_optimizer", "resume_param_scheduler", "new_parameters")

_KINDS = {"load_from": "the path of a checkpoint or None", "resume": "True, False or the path of a checkpoint"}


@final
class ResumeSource:
    """The checkpoint that a run resumes from or loads weights from. Training uses it only once.

    Args:
        load_from: a checkpoint to load the weights from, or to resume from if ``resume`` is True.
        resume: False, True (from ``load_from`` or the latest checkpoint of the run, if any), or a path.
        resume_optimizer: whether to restore the state of the optimizers. It is always restored from a checkpoint of this launch.
        resume_param_scheduler: whether to restore the schedules and the optimizer options.
        new_parameters: regular expressions for the names of parameters that may be missing from the checkpoint.

    Attributes:
        changes: the configuration changes since the checkpoint was saved, one line each.
        resumes: whether the run is configured to resume, even if there is no checkpoint yet.

    Raises:
        ConfigValueError: if both ``load_from`` and ``resume`` specify a checkpoint, or a pattern is not a regular expression.
        ConfigTypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        load_from: str | os.PathLike[str] | None,
        resume: bool | str | os.PathLike[str],
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool,
        new_parameters: Sequence[str],
    ) -> None:
        for name, value in (("load_from", load_from), ("resume", None if isinstance(resume, bool) else resume)):
            if not isinstance(value, str | os.PathLike | None):
                raise ConfigTypeError(f"{name} must be {_KINDS[name]}, got {value!r}.")
        if not isinstance(resume, bool) and resume is not None and load_from is not None:
            raise ConfigValueError(
                f"resume={mask_text(os.fspath(resume))!r} and load_from={mask_text(os.fspath(load_from))!r} both specify "
                "a checkpoint. Set only one of them."
            )
        self.changes: tuple[str, ...] = ()
        # Whether the loaded checkpoint contains averaged weights.
        self.has_average = False
        # The entry `meta` of the loaded checkpoint.
        self.meta: Mapping[str, Any] = {}
        self._load_from, self._resume = load_from, resume
        self.resumes = bool(resume)
        for name, choice in (
            ("resume_optimizer", resume_optimizer),
            ("resume_param_scheduler", resume_param_scheduler),
        ):
            if not isinstance(choice, bool):
                raise ConfigTypeError(f"{name} must be True or False, got {choice!r}.")
        # Omit resume_optimizer if it is True, because custom strategies may not accept the argument.
        self._fresh: dict[str, Any] = {} if resume_optimizer else {"resume_optimizer": False}
        self._how: dict[str, Any] = {
            "resume_param_scheduler": resume_param_scheduler,
            "new_parameters": _patterns(new_parameters),
        }

    def restore(self, run: Run, config_text: str, *, training: bool, strict: bool = False) -> Mapping[str, Any] | None:
        """Load or resume the checkpoint; return the rest of the checkpoint if the run resumes, otherwise None.

        Collective. Evaluation does not use up a checkpoint to resume, because it restores neither the optimizer nor the
        schedules: training that follows an evaluation resumes from the same checkpoint.

        Args:
            run: the run, whose strategy is prepared.
            config_text: the current configuration, which is compared with the one in the checkpoint.
            training: whether the run trains.
            strict: whether the checkpoint must contain exactly the weights of the model if only weights are loaded.
        """
        load_from, resume = self._load_from, self._resume
        own = _saved_by_this_launch(run) if training else []
        if training or not resume:
            self._load_from, self._resume = None, False

        def call_hooks(checkpoint: dict[str, Any]) -> None:
            self.has_average = has_averaged_weights(checkpoint)
            self.meta = checkpoint.get("meta") or {}
            run.events.call("after_load_checkpoint", run, checkpoint=checkpoint)

        def load_or_resume(resume: bool | str | os.PathLike[str]) -> Mapping[str, Any] | None:
            return run.strategy.load_or_resume(
                load_from=None if own else load_from,
                resume=resume,
                callback=call_hooks,
                **self._how,
                **({} if own else self._fresh),
            )

        if own:
            rest = resume_newest(own, load_or_resume, run.logger)
        elif strict and load_from is not None and not resume:
            run.strategy.load_checkpoint(load_from, strict=True, callback=call_hooks)
            return None
        else:
            rest = load_or_resume(resume)
        if training and self.meta:
            adopt_tracking(run, self.meta, resumed=rest is not None and bool(own or resume), loaded_from=load_from)
        if rest is None or not (own or resume):
            return None
        meta = rest.get("meta") or {}
        self.changes = _log_changes(run, meta, config_text)
        run.history = RunHistory.from_meta(meta)
        run.progress.move_to(Position.from_meta(meta))
        run.load_hooks(rest)
        run.adopt_id(meta)
        run.save_counter.resume_from(run.strategy.resumed_from, meta)
        run.logger.info("Resumed after epoch %d, iteration %d", run.epoch, run.iter)
        return rest


def restore_data_position(run: Run, rest: Mapping[str, Any], loader: EpochLoader) -> None:
    """Restore the position in the training data from the checkpoint that :meth:`ResumeSource.restore` returned."""
    progress = run.progress
    data = rest.get("data")
    if not isinstance(data, Mapping) or not loader.positioned:
        progress.batch = _batch_of_this_run(run, rest.get("meta") or {})
    if not isinstance(data, Mapping):
        return
    progress.batch = loader.resume_at(progress.epoch, progress.batch, data.get("taken") or ())
    states = data.get("ranks")
    if not isinstance(states, Mapping):
        return
    world = run.world
    if len(states) != world.size:
        run.logger.warning(
            "The states of the dataloaders were saved by %d ranks, but this run has %d: the remaining epoch may repeat or "
            "skip samples.",
            len(states), world.size,
        )  # fmt: skip
    if str(world.rank) in states:
        loader.load_state_dict(states[str(world.rank)], epoch=progress.epoch, batch=progress.batch)


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise ConfigTypeError(f"Expected new_parameters to be a list of regular expressions, got {given!r}.")
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigValueError(f"new_parameters: {pattern!r} is not a regular expression: {error}.") from error
    return tuple(given)


def _saved_by_this_launch(run: Run) -> list[CheckpointInfo]:
    """Return the checkpoints to resume from if the launcher restarted this run, the newest first. Collective.

    Only checkpoints of the restarted run are considered: other runs in the folder may have saved newer ones. The
    list is empty if this is the first launch, or if no checkpoint was saved since then.
    """
    launch = LaunchIdentity.here(all_gather_object(ProcessIdentity.of_parent()))
    folder = Path(run.work_dir)

    def find() -> list[CheckpointInfo]:
        latest = find_restart_checkpoint(folder, launch, run.logger)
        found = list_checkpoints(folder) if latest is not None else []
        run_ids = [each.run_id for each in found if each.path == latest]
        return [each for each in found if each.run_id in run_ids]

    return RankGroup.of().run_on_rank0(find)


def _log_changes(run: Run, meta: Mapping[str, Any], config_text: str) -> tuple[str, ...]:
    """Log the configuration values that differ from the checkpoint; return one line per value."""
    saved = meta.get("cfg")
    changed = changed_values(saved, config_text, ignored=_RESUMING) if isinstance(saved, str) else []
    if changed:
        run.logger.info("The configuration differs from that in the checkpoint:\n  %s", "\n  ".join(changed))
    return tuple(changed)


def _batch_of_this_run(run: Run, meta: Mapping[str, Any]) -> int:
    """Return the consumed part of the epoch as a number of batches of this run."""
    position = Position.from_meta(meta)
    own = run.strategy.dispatch_kwargs.get("train_micro_batch_size_per_gpu")
    old = meta.get("train_micro_batch_size_per_gpu")
    if not (position.batch and own and old):
        return position.batch
    parts = meta.get("data_size", meta.get("world_size", 1))
    return position.in_batches_of(own * run.strategy.dp_size, old * parts).batch
