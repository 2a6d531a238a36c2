"""Each session of a run: from where it went on, with what changed, and how it ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stratagem.checkpoint import RetentionTag
from stratagem.distributed import RankGroup
from stratagem.train.loops import updates_of
from stratagem.train.resume.slurm_requeue import requeue_job
from stratagem.train.run.context import INTERRUPTED, Run
from stratagem.train.run.run_history import Outcome, Session
from stratagem.train.run.signals import JOB_ENDS
from stratagem.utils import mask_text

__all__ = ["end_interrupted", "is_complete", "session_record"]


@contextmanager
def session_record(run: Run, changes: Sequence[str]) -> Iterator[None]:
    """Write down on rank 0 from where this session goes on, and at the end of the context how it ended.

    Args:
        run: what begins or goes on.
        changes: what was changed in the configuration since the checkpoint was saved, a line each.
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
    how = "killed"
    if run.rank == 0:
        run.history.write(folder)
    try:
        yield
        received = run.interrupt.received
        name = None if received is None else signal.Signals(received).name
        how = f"stopped by {name}" if name else "complete" if is_complete(run) else "stopped early"
    except BaseException as error:
        how = f"failed: {type(error).__name__}: {_first_line(error)}"
        raise
    finally:
        if run.rank == 0:
            run.history.write(folder, Outcome.now(how, epoch=run.epoch, iteration=run.iter))


def _first_line(error: BaseException) -> str:
    # Masked before it is cut: a secret may have several lines.
    return next(iter(mask_text(str(error)).splitlines()), "")


def is_complete(run: Run) -> bool:
    """Tell whether a run has been trained for all of its length."""
    progress = run.progress
    if progress.max_epochs is not None:
        return progress.epoch >= progress.max_epochs
    if progress.max_steps is not None:
        return updates_of(run) >= progress.max_steps
    return progress.max_iters is not None and progress.iter >= progress.max_iters


def end_interrupted(run: Run, begin: int, *, requeue: bool) -> None:
    """Save where an interrupted run stands, if that is not where it began. Collective.

    Args:
        run: what was interrupted.
        begin: after how many iterations this session began.
        requeue: whether SLURM is to start it again, where it was SLURM that asked it to end.

    Raises:
        CheckpointError: if it cannot be saved.
    """
    if run.iter != begin:
        path = Path(run.work_dir) / f"iter_{run.iter}"
        run.save_checkpoint(path, run.progress.here(), retention_tag=RetentionTag(group=INTERRUPTED, number=run.iter))
        # Said only when it is true: it may be written in the background.
        run.checkpoint_writer.wait()
        run.logger.warning("Interrupted after %d iterations; saved checkpoint %s", run.iter, path)
    else:
        run.logger.warning("Interrupted before the first iteration of this session; nothing is to be saved.")
    if requeue and run.interrupt.received in JOB_ENDS:
        RankGroup.of().run_on_rank0(lambda: requeue_job(run.logger))
