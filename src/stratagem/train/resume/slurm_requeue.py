"""Put a SLURM job back into the queue."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping

__all__ = ["requeue_job"]

_TIMEOUT_S = 30


def requeue_job(logger: logging.Logger, environ: Mapping[str, str] = os.environ) -> bool:
    """Have SLURM start this process's job again, under the same number; return whether it will.

    The checkpoint is published when this is called, so what fails here is logged, with what to do, and not raised.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        logger.warning(
            "requeue=True does nothing here: this process belongs to no SLURM job (SLURM_JOB_ID is not set)."
        )
        return False
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None:
        logger.error(
            "SLURM's scontrol is not on the PATH, so job %s was not put back. Run `scontrol requeue %s`.", job, job
        )
        return False
    try:
        done = subprocess.run(  # noqa: S603 -- SLURM's own program with a number as its argument
            [scontrol, "requeue", job], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("Job %s was not put back into the queue: %s. Run `scontrol requeue %s`.", job, error, job)
        return False
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        logger.warning("`scontrol requeue %s` failed with status %d: %s", job, done.returncode, said)
        return False
    logger.info("Job %s is back in the queue, and goes on from the checkpoint when it starts again.", job)
    return True
