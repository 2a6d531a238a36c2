"""Batch jobs of SLURM as `stratagem submit` writes them: run, preempted, put into the queue again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import STRATAGEM, Jobs, facts, records, train, wait_until
from slurm import Slurm

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]


def submit(jobs: Jobs, slurm: Slurm, *more: str) -> str:
    """Submit the digits with two ranks on the CPU; return the job's number."""
    words = ["submit", *train("run", "--nodes", "1", "--tasks-per-node", "2", "--time", "10", "--now", *more)[2:]]
    output = jobs.run([*STRATAGEM, *words], SLURM_CONF=str(slurm.conf))
    assert "Submitted batch job" in output
    return output.split()[-1]


def wait_for_end(slurm: Slurm, job: str, folder: Path) -> None:
    """Wait until a job has left the queue; it has to have ended well."""
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    wait_until(lambda: slurm.state(job) in ended, f"the end of job {job}")
    assert slurm.state(job) == "COMPLETED", (folder / f"slurm-{job}.out").read_text()


def test_sbatch(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm) -> None:
    """The script that `submit` writes trains the same; the log stands in the folder of the run."""
    job = submit(jobs, slurm)
    wait_for_end(slurm, job, tmp_path / "run")
    assert facts(tmp_path / "run") == two_ranks
    assert [record["launcher"] for record in records(tmp_path / "run")] == ["slurm", "slurm"]
    assert "Trained 16 iterations" in (tmp_path / "run" / f"slurm-{job}.out").read_text()


STOPS = {
    "before the end": (
        "scancel",
        "--signal=USR1",
        "--batch",
    ),  # as SLURM does by itself, --save-before the time is over
    "preempted": ("scontrol", "requeue"),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_job_that_is_stopped_goes_on_where_it_was(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm, stop: tuple[str, ...]
) -> None:
    """The ranks save, the job is back in the queue, resumes and ends with the same weights."""
    run = tmp_path / "run"
    job = submit(jobs, slurm, "--set", "custom_hooks.0.pause_s=0.4")
    progress = run / "progress_0"
    wait_until(lambda: progress.exists() and len(progress.read_text().split()) >= 3, "three iterations")
    slurm.ask(*stop, job)
    wait_until(lambda: any(run.glob("iter_1[0-9]")) and slurm.state(job) == "PENDING", "the job in the queue again")
    wait_for_end(slurm, job, run)
    log = (run / f"slurm-{job}.out").read_text()
    assert "Interrupted after 10 of 16 iterations" in log
    assert "Going on after" in log
    for record, expected in zip(records(run), two_ranks, strict=True):
        assert record["samples"] == expected["samples"][10:]
        assert record["losses"] == expected["losses"][10:]
        assert record["weights"] == expected["weights"]
