"""Resume a strategy from a given checkpoint, or from the newest readable one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

from stratagem.checkpoint import CheckpointInfo, StateTree, list_checkpoints
from stratagem.checkpoint.catalog.find import resumable_first
from stratagem.distributed import RankGroup
from stratagem.errors import CheckpointDamagedError, CheckpointNotFoundError
from stratagem.logging import Logger
from stratagem.optim import ParamScheduler
from stratagem.parallel import AnyOptim
from stratagem.strategies.state.configured_hyperparameters import ConfiguredHyperparameters, move_schedulers

__all__ = ["CheckpointCallback", "Resumable", "Resuming", "Schedulers", "resume_newest"]

T = TypeVar("T")

CheckpointCallback = Callable[[StateTree], None]
Schedulers = list[ParamScheduler] | dict[str, list[ParamScheduler]]


class Resumable(Protocol):
    """The strategy interface that resuming requires."""

    logger: Logger
    resumed_from: str | None

    @property
    def work_dir(self) -> str:
        """The folder that is searched for the newest checkpoint."""

    @property
    def resume(self) -> Callable[..., StateTree]:
        """Restore the state of the run from a checkpoint."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """The options of :meth:`BaseStrategy.load_or_resume`, and the prepared optimizers and schedules."""

    callback: CheckpointCallback | None
    resume_optimizer: bool
    resume_param_scheduler: bool
    new_parameters: tuple[str, ...]
    optim: AnyOptim | None
    schedulers: Schedulers | None

    def resume(self, strategy: Resumable, filename: str | os.PathLike[str]) -> StateTree:
        """Resume; with ``resume_param_scheduler=False``, keep the configured schedules and options. Collective."""
        # Omit an empty new_parameters, since custom strategies may not accept this argument.
        new: dict[str, Any] = {"new_parameters": self.new_parameters} if self.new_parameters else {}
        if not self.resume_optimizer:
            new["resume_optimizer"] = False
            strategy.logger.info("resume_optimizer=False: the optimizers start without the state of the checkpoint.")
        if self.resume_param_scheduler or self.optim is None:
            rest = strategy.resume(filename, callback=self.callback, **new)
            strategy.resumed_from = os.fspath(filename)
            return rest
        own = ConfiguredHyperparameters(self.optim)
        rest = strategy.resume(filename, callback=self.callback, resume_param_scheduler=False, **new)
        strategy.resumed_from = os.fspath(filename)
        own.restore(self.optim)
        meta = rest.get("meta") or {}
        epoch, iteration = int(meta.get("epoch", 0)), int(meta.get("iter", 0))
        move_schedulers(self.schedulers or [], self.optim, epoch=epoch, iteration=iteration)
        strategy.logger.info(
            "Using the schedules and optimizer options of this run's configuration from epoch %d, iteration %d.",
            epoch,
            iteration,
        )
        return rest

    def resume_latest(self, strategy: Resumable) -> StateTree | None:
        """Resume from the newest checkpoint that is readable on every rank; log skipped checkpoints. Collective.

        Returns None if there are no checkpoints.

        Raises:
            CheckpointDamagedError: if there are checkpoints, but none is readable.
        """
        # Use the list of rank 0, so that all ranks resume from the same checkpoint.
        found = RankGroup.of().run_on_rank0(lambda: list_checkpoints(strategy.work_dir))
        if not found:
            strategy.logger.info("No checkpoint found under %s. Starting from scratch.", strategy.work_dir)
            return None
        runs = {each.run_id for each in found if each.run_id is not None}
        if len(runs) > 1:
            strategy.logger.info(
                "%s has checkpoints of %d runs. Resuming from the newest, %s. To use a different one, set "
                "resume=<path>.",
                strategy.work_dir, len(runs), found[0].path.name,
            )  # fmt: skip
        return resume_newest(found, lambda path: self.resume(strategy, path), strategy.logger)


def resume_newest(found: Sequence[CheckpointInfo], resume: Callable[[Path], T], logger: Logger) -> T:
    """Resume from the first checkpoint that is readable on every rank, and return what ``resume`` returns. Collective.

    Checkpoints that were saved without the optimizer are tried last.

    Args:
        found: at least one checkpoint, newest first, the same on every rank.
        resume: a function that resumes from the given path.
        logger: the logger for warnings about skipped checkpoints.

    Raises:
        CheckpointDamagedError: if none is readable.
    """
    for candidate in resumable_first(found):
        fault = candidate.fault
        if not fault:
            try:
                return resume(candidate.path)
            except (CheckpointDamagedError, CheckpointNotFoundError) as error:
                # The checkpoint is damaged, or a rank cannot see it. The state of this run has not been changed.
                fault = str(error)
        logger.warning("Skipped checkpoint %s: %s", candidate.path, fault)
    raise CheckpointDamagedError(
        f"None of the {len(found)} checkpoints under {found[0].path.parent} is readable; see the log for the reasons. "
        "Specify a different checkpoint with resume=<path>, or move these checkpoints to another folder to start from "
        "scratch."
    )
