"""Go back to an earlier checkpoint without leaving the process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, final

from stratagem.errors import TrainingError
from stratagem.strategies import BaseStrategy
from stratagem.train.run.context import Run
from stratagem.train.run.progress import Position

__all__ = ["RollBackError", "roll_back"]


@final
class RollBackError(TrainingError):
    """Ends a training loop so that the run goes on from an earlier checkpoint, behind the data that spoiled it.

    :class:`~stratagem.Runner` serves it; in a loop without one it is the error that its message says.

    Args:
        message: what spoiled the run.
        checkpoint: where to go back to.
        iteration: the last iteration, counted from 1, whose data is passed over.
        epoch: the epoch in which to go on.
        batch: how many batches of it to pass over.
    """

    def __init__(self, message: str, checkpoint: Path, *, iteration: int, epoch: int, batch: int) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        self.iteration = iteration
        self.epoch = epoch
        self.batch = batch


def roll_back(run: Run, request: RollBackError) -> None:
    """Take up the state of an earlier checkpoint, and the data behind what spoiled the run. Collective.

    Iterations, updates and schedules by them go on with the checkpoint's count: batches that are passed over are none.
    Schedules by epoch follow the data.
    """
    if run.bar is not None:
        run.bar.stop()
    run.optim_wrapper.discard_accumulation()
    run.optim_wrapper.zero_grad()

    def tell(checkpoint: dict[str, Any]) -> None:
        run.events.call("after_load_checkpoint", run, checkpoint=checkpoint)

    rest = run.strategy.resume(request.checkpoint, callback=tell)
    # What waited there for its update may be of the data that is passed over.
    run.optim_wrapper.discard_accumulation()
    run.save_counter.restore(Path(request.checkpoint))
    saved = Position.from_meta(rest.get("meta") or {})
    run.load_hooks(rest)
    run.progress.move_to(replace(saved, epoch=request.epoch, batch=request.batch))
    _follow_epochs(run, request.epoch - saved.epoch)
    _end_windows(run)
    run.logger.warning(
        "Rolled back to %s, after %d iterations. The data of %d iterations is passed over: going on in epoch %d after "
        "batch %d.", request.checkpoint, saved.iter, request.iteration - saved.iter, request.epoch + 1, request.batch,
    )  # fmt: skip


def _follow_epochs(run: Run, epochs: int) -> None:
    """Move schedules by epoch on over the ends of epochs that were passed over."""
    schedulers = BaseStrategy.param_schedulers.get(run.strategy) or []
    everything = [each for some in schedulers.values() for each in some] if isinstance(schedulers, dict) else schedulers
    for scheduler in everything:
        if epochs and scheduler.unit == "epoch" and not scheduler.need_val_args:
            scheduler.step(epochs)


def _end_windows(run: Run) -> None:
    """Tell optimizers that accumulate when a run by epochs ends now: its last window may be shorter."""
    end = run.progress.end_of_epochs()
    for wrapper in run.optim_wrapper.each().values():
        if end is not None and wrapper.accumulative_counts > 1:
            wrapper.initialize_count_status(run.model, wrapper.inner_count, end)
