"""Record each session of a run: its checkpoint, the configuration changes, and the outcome."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stratagem.train.loops import updates_of
from stratagem.train.resume.tracked_sessions import begin_tracking
from stratagem.train.run.context import Run
from stratagem.train.run.run_history import Outcome, Session
from stratagem.train.trackers.tracker import EndState
from stratagem.utils import mask_text

__all__ = ["is_complete", "session_record"]


@contextmanager
def session_record(run: Run, changes: Sequence[str]) -> Iterator[None]:
    """Add a session to the history of a run, and write its record on rank 0, at the beginning and, with the outcome, at the end.

    Args:
        run: the run, at the position where the session starts.
        changes: the configuration changes since the checkpoint was saved, one line each.
    """
    strategy, folder = run.strategy, Path(run.log_dir)
    session = Session(
        name=f"{Path(run.work_dir).name}/{strategy.timestamp}",
        epoch=run.epoch,
        iter=run.iter,
        checkpoint=mask_text(strategy.resumed_from) if strategy.resumed_from else None,
        changes=tuple(map(mask_text, changes)),
        strategy=type(strategy).__name__,
        world_size=run.world_size,
    )
    run.history = run.history.with_session(session)
    how, state = "killed", EndState.FAILED
    if run.rank == 0:
        run.history.write(folder, run.logger)
    begin_tracking(run)
    try:
        yield
        received = run.interrupt.received
        name = None if received is None else signal.Signals(received).name
        how = f"stopped by {name}" if name else "complete" if is_complete(run) else "stopped early"
        state = EndState.INTERRUPTED if name else EndState.COMPLETE if is_complete(run) else EndState.STOPPED
    except BaseException as error:
        how = f"failed: {type(error).__name__}: {_first_line(error)}"
        raise
    finally:
        if run.rank == 0:
            run.history.write(folder, run.logger, Outcome.now(how, epoch=run.epoch, iteration=run.iter))
        run.tracking.outcome = (state, how)


def _first_line(error: BaseException) -> str:
    # Mask before splitting: a secret can span several lines.
    return next(iter(mask_text(str(error)).splitlines()), "")


def is_complete(run: Run) -> bool:
    """Return whether a run has reached its full length."""
    progress = run.progress
    if progress.max_epochs is not None:
        return progress.epoch >= progress.max_epochs
    if progress.max_steps is not None:
        return updates_of(run) >= progress.max_steps
    return progress.max_iters is not None and progress.iter >= progress.max_iters
