"""SLURM batch jobs from `stratagem submit`: completed, preempted and requeued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launchers.jobs import STRATAGEM, Jobs, check_continued, facts, records, train, wait_until
from tests.launchers.slurm import Slurm

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]


def submit(jobs: Jobs, slurm: Slurm, *more: str) -> str:
    """Submit the digits example with two ranks on the CPU; return the job ID."""
    words = ["submit", *train("run", "--nodes", "1", "--tasks-per-node", "2", "--time", "10", "--now", *more)[2:]]
    output = jobs.run([*STRATAGEM, *words], SLURM_CONF=str(slurm.conf))
    assert "Submitted batch job" in output
    return output.split()[-1]


def wait_for_end(slurm: Slurm, job: str, folder: Path) -> None:
    """Wait until a job has left the queue, and require that it completed."""
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    wait_until(lambda: slurm.state(job) in ended, f"the end of job {job}")
    assert slurm.state(job) == "COMPLETED", (folder / f"slurm-{job}.out").read_text()


def test_sbatch(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm) -> None:
    """The script from `submit` gives the same results and writes its log to the folder of the run."""
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
    ),  # SLURM sends this signal --save-before the time limit
    "preempted": ("scontrol", "requeue"),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_stopped_job_is_requeued_and_resumes(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], slurm: Slurm, stop: tuple[str, ...]
) -> None:
    """The ranks save, the job is requeued and resumes, and its final weights are the same."""
    run = tmp_path / "run"
    job = submit(jobs, slurm, "--set", "custom_hooks.0.pause_s=0.4")
    progress = run / "progress_0"
    wait_until(lambda: progress.exists() and len(progress.read_text().split()) >= 3, "three iterations")
    slurm.ask(*stop, job)
    wait_until(
        lambda: "Restarts=1" in slurm.ask("scontrol", "--oneliner", "show", "job", job), "the job in the queue again"
    )
    wait_for_end(slurm, job, run)
    log = (run / f"slurm-{job}.out").read_text()
    check_continued(run, log, two_ranks)
