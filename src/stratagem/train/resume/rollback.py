"""Roll a run back to an earlier checkpoint within the same process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, final

from stratagem.errors import TrainingError
from stratagem.train.resume.tracked_sessions import rewind_tracking
from stratagem.train.run.context import Run
from stratagem.train.run.progress import Position

__all__ = ["RollBackError", "roll_back"]


@final
class RollBackError(TrainingError):
    """Raised to request that the run resume from an earlier checkpoint and skip the data that caused the problem.

    :class:`~stratagem.Runner` handles this exception; without a runner, it is an ordinary error.

    Args:
        message: the reason.
        checkpoint: the checkpoint to resume from.
        iteration: the last iteration, counted from 1, whose data is skipped.
        epoch: the epoch to resume in, counted from 0.
        batch: the number of batches of this epoch to skip.
    """

    def __init__(self, message: str, checkpoint: Path, *, iteration: int, epoch: int, batch: int) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        self.iteration = iteration
        self.epoch = epoch
        self.batch = batch


def roll_back(run: Run, request: RollBackError) -> None:
    """Restore an earlier checkpoint, and continue with the data after the requested position. Collective.

    The iteration and step counts, and the schedules that depend on them, are restored from the checkpoint; skipped batches do
    not count. Epoch-based schedules follow the position in the data.
    """
    if run.bar is not None:
        run.bar.stop()
    run.optim_wrapper.discard_accumulation()
    run.optim_wrapper.zero_grad()

    def call_hooks(checkpoint: dict[str, Any]) -> None:
        run.events.call("after_load_checkpoint", run, checkpoint=checkpoint)

    rest = run.strategy.resume(request.checkpoint, callback=call_hooks)
    # The accumulated gradients in the checkpoint may come from data that is skipped.
    run.optim_wrapper.discard_accumulation()
    run.save_counter.restore(Path(request.checkpoint))
    saved = Position.from_meta(rest.get("meta") or {})
    run.load_hooks(rest)
    run.progress.move_to(replace(saved, epoch=request.epoch, batch=request.batch))
    _follow_epochs(run, request.epoch - saved.epoch)
    _update_run_length(run)
    rewind_tracking(run)
    run.logger.warning(
        "Rolled back to %s, after %d iterations. Skipping the data of %d iterations: continuing in epoch %d after "
        "batch %d.", request.checkpoint, saved.iter, request.iteration - saved.iter, request.epoch + 1, request.batch,
    )  # fmt: skip


def _follow_epochs(run: Run, epochs: int) -> None:
    """Advance epoch-based schedules by the number of epoch ends that were skipped."""
    schedulers = run.param_schedulers or []
    everything = [each for some in schedulers.values() for each in some] if isinstance(schedulers, dict) else schedulers
    for scheduler in everything:
        if epochs and scheduler.unit == "epoch" and not scheduler.need_val_args:
            scheduler.step(epochs)


def _update_run_length(run: Run) -> None:
    """Update the total number of iterations in the optimizer wrappers, because the last accumulation window may be shorter."""
    end = run.progress.end_of_epochs()
    for wrapper in run.optim_wrapper.each().values():
        if end is not None and wrapper.accumulative_counts > 1:
            wrapper.initialize_count_status(run.model, wrapper.inner_count, end)
