"""Save a run that was interrupted by a signal, and requeue its SLURM job."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint import RetentionTag
from stratagem.distributed import RankGroup
from stratagem.errors import ConfigTypeError
from stratagem.train.run.context import INTERRUPTED, Run
from stratagem.train.run.signals import PREEMPTION_SIGNALS

__all__ = ["requeue_job", "require_requeue", "save_interrupted"]

_TIMEOUT_S = 30


def require_requeue(requeue: Any) -> bool:
    """Check the option ``requeue``, and return it.

    Raises:
        ConfigTypeError: if it is not a bool.
    """
    if not isinstance(requeue, bool):
        raise ConfigTypeError(f"requeue must be True or False, got {requeue!r}.")
    return requeue


def save_interrupted(run: Run, begin: int, *, requeue: bool) -> None:
    """Save a checkpoint of an interrupted run, unless no iteration was completed in this session. Collective.

    Args:
        run: the interrupted run.
        begin: the number of completed iterations when this session started.
        requeue: whether to requeue the SLURM job if the signal announced its end.

    Raises:
        CheckpointError: if the checkpoint cannot be saved.
    """
    if run.iter != begin:
        path = Path(run.work_dir) / f"iter_{run.iter}"
        tag = RetentionTag(group=INTERRUPTED, number=run.iter)
        run.save_checkpoint(path, run.progress.here(), retention_tag=tag)
        # The checkpoint may be written in the background, so log it only once it is durable.
        run.checkpoint_writer.wait()
        run.logger.warning("Interrupted after %d iterations; saved checkpoint %s", run.iter, path)
    else:
        run.logger.warning("Interrupted before the first iteration of this session; nothing to save.")
    if requeue and run.interrupt.received in PREEMPTION_SIGNALS:
        RankGroup.of().run_on_rank0(lambda: requeue_job(run.logger))


def requeue_job(logger: logging.Logger, environ: Mapping[str, str] = os.environ) -> bool:
    """Requeue the SLURM job of this process under the same job ID; return whether it succeeded.

    The checkpoint is already saved at this point, so a failure is logged, with instructions, rather than raised.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        logger.warning(
            "requeue=True has no effect: this process does not run in a SLURM job (SLURM_JOB_ID is not set)."
        )
        return False
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None:
        logger.error(
            "Job %s was not requeued: scontrol is not on the PATH. Run `scontrol requeue %s` to resume it.", job, job
        )
        return False
    try:
        done = subprocess.run(  # noqa: S603 -- SLURM's scontrol with a job ID as its argument
            [scontrol, "requeue", job], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("Job %s was not requeued: %s. Run `scontrol requeue %s` to resume it.", job, error, job)
        return False
    if done.returncode != 0:
        output = (done.stderr or done.stdout).strip()
        logger.warning("`scontrol requeue %s` failed with status %d: %s", job, done.returncode, output)
        return False
    logger.info("Job %s was requeued; it resumes from this checkpoint when it starts again.", job)
    return True
