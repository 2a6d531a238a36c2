"""Resume a strategy: from a checkpoint that is named, or from the newest that can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

from stratagem.checkpoint import CheckpointInfo, StateTree, list_checkpoints
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
    """What resuming needs of a strategy."""

    logger: Logger
    resumed_from: str | None

    @property
    def work_dir(self) -> str:
        """The folder under which the newest checkpoint is looked for."""

    @property
    def resume(self) -> Callable[..., StateTree]:
        """Restores everything from a checkpoint."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """How to resume, see :meth:`BaseStrategy.load_or_resume`, and the optimizers and schedules that were prepared."""

    callback: CheckpointCallback | None
    resume_param_scheduler: bool
    new_parameters: tuple[str, ...]
    optim: AnyOptim | None
    schedulers: Schedulers | None

    def resume(self, strategy: Resumable, filename: str | os.PathLike[str]) -> StateTree:
        """Resume, with the run's own schedules and options where that is asked for. Collective."""
        # Not given where there are none: strategies of others need not know the argument.
        new: dict[str, Any] = {"new_parameters": self.new_parameters} if self.new_parameters else {}
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
            "Schedules and the optimizers' options are this run's own, from epoch %d, iteration %d on.",
            epoch,
            iteration,
        )
        return rest

    def resume_latest(self, strategy: Resumable) -> StateTree | None:
        """Resume from the newest checkpoint that every rank can read whole; name those that are skipped. Collective.

        Raises:
            CheckpointDamagedError: if there are checkpoints, and none of them can be used.
        """
        # Rank 0's list, so that all ranks go on from the same step.
        found = RankGroup.of().run_on_rank0(lambda: list_checkpoints(strategy.work_dir))
        if not found:
            strategy.logger.info("No checkpoint to resume from under %s; starting anew.", strategy.work_dir)
            return None
        runs = {each.run_id for each in found if each.run_id is not None}
        if len(runs) > 1:
            strategy.logger.info(
                "%s has checkpoints of %d runs. The newest by the clock is %s; name another with resume=<path>.",
                strategy.work_dir, len(runs), found[0].path.name,
            )  # fmt: skip
        return resume_newest(found, lambda path: self.resume(strategy, path), strategy.logger)


def resume_newest(found: Sequence[CheckpointInfo], resume: Callable[[Path], T], logger: Logger) -> T:
    """Return what ``resume`` returns for the first of some checkpoints that every rank can read whole. Collective.

    Args:
        found: the newest first, the same on every rank; at least one.
        resume: resumes from a path.
        logger: receives a warning for each that is skipped.

    Raises:
        CheckpointDamagedError: if none of them can be used.
    """
    for candidate in found:
        fault = candidate.fault
        if not fault:
            try:
                return resume(candidate.path)
            except (CheckpointDamagedError, CheckpointNotFoundError) as error:
                # Found while reading, on some rank, which may not even see it; nothing of this run was changed.
                fault = str(error)
        logger.warning("The checkpoint %s is passed over: %s", candidate.path, fault)
    raise CheckpointDamagedError(
        f"None of the {len(found)} checkpoints under {found[0].path.parent} can be used; the log says why. Name another with "
        "resume=<path>, or move them away to start anew."
    )
