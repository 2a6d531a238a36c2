"""Tests of the checkpoint that a restarted run resumes from, with simulated launches."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from stratagem.checkpoint import save_checkpoint
from stratagem.dist import ProcessIdentity
from stratagem.train.resume.preemption import requeue_job
from stratagem.train.resume.relaunch import LaunchIdentity, find_restart_checkpoint
from tests.support.manifests import change_manifest

# A logger outside the package, because earlier tests may have reconfigured the package's loggers.
LOGGER = logging.getLogger("test-of-restarts")
AGENT = ProcessIdentity(11, "this machine", "900")
OTHER_AGENT = ProcessIdentity(12, "another machine", "950")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


def start(*agents: ProcessIdentity, number: int = 0, **environ: str) -> LaunchIdentity:
    """Return the nth start by torchrun's agents."""
    return LaunchIdentity.here(
        agents, {**TORCHRUN, **environ}, process=ProcessIdentity(100 + number, "this machine", "1000")
    )


FIRST, SECOND, THIRD = (start(AGENT, AGENT, number=number) for number in range(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory that holds the checkpoint of an earlier run."""
    save(tmp_path, 100)
    return tmp_path


def save(folder: Path, iteration: int) -> Path:
    """Save a checkpoint."""
    save_checkpoint({"state_dict": {}, "meta": {"iter": iteration}}, folder / f"iter_{iteration}")
    return folder / f"iter_{iteration}"


def test_a_restarted_launch_resumes_from_its_own_checkpoint(folder: Path):
    """The first start ignores the earlier run's checkpoint; later starts resume from the launch's own."""
    assert find_restart_checkpoint(folder, FIRST, LOGGER) is None
    own = save(folder, 2)
    assert find_restart_checkpoint(folder, SECOND, LOGGER) == own
    later = save(folder, 4)
    assert find_restart_checkpoint(folder, THIRD, LOGGER) == later


def test_an_earlier_run_with_a_later_timestamp_does_not_hide_the_launchs_checkpoint(folder: Path):
    """If the clock was set back since that run, the launch still resumes from its own checkpoint."""
    change_manifest(folder / "iter_100", saved_at=4e9)
    find_restart_checkpoint(folder, FIRST, LOGGER)
    own = save(folder, 2)
    assert find_restart_checkpoint(folder, SECOND, LOGGER) == own
    # Saved under the name of an earlier one, it is still the launch's own checkpoint.
    replaced = save(folder, 100)
    assert find_restart_checkpoint(folder, THIRD, LOGGER) == replaced


def test_a_program_that_trains_twice_is_not_restarted(folder: Path):
    """The second ``train()`` of a program is not a restart; only a new process is one."""
    assert find_restart_checkpoint(folder, FIRST, LOGGER) is None
    own = save(folder, 2)
    assert find_restart_checkpoint(folder, FIRST, LOGGER) is None
    assert find_restart_checkpoint(folder, SECOND, LOGGER) == own


def test_a_launch_that_saved_nothing_starts_over(folder: Path):
    """The checkpoint of an earlier run in the same directory is never used, after any number of restarts."""
    for launch in (FIRST, SECOND, THIRD):
        assert find_restart_checkpoint(folder, launch, LOGGER) is None


def test_another_launch_does_not_resume_automatically(folder: Path):
    """A new torchrun with the same rendezvous id is a new run, because its agent is another process."""
    find_restart_checkpoint(folder, FIRST, LOGGER)
    save(folder, 2)
    assert find_restart_checkpoint(folder, start(ProcessIdentity(11, "this machine", "999"), number=1), LOGGER) is None


def test_ranks_that_leave_and_join_stay_one_launch(folder: Path):
    """The launch is the same as long as one of torchrun's agents is still running, whichever rank it starts."""
    find_restart_checkpoint(folder, FIRST, LOGGER)
    own = save(folder, 2)
    assert find_restart_checkpoint(folder, start(OTHER_AGENT, AGENT, number=1), LOGGER) == own
    assert find_restart_checkpoint(folder, start(OTHER_AGENT, number=2), LOGGER) == own


def test_a_requeued_job_resumes(folder: Path):
    """SLURM counts the restarts of a job; a second ``srun`` of one job is a separate run."""
    job = LaunchIdentity.here([AGENT], {"SLURM_JOB_ID": "7"}, process=ProcessIdentity(1, "a node", "1"))
    back = replace(job, restarts=1, process=(2, "a node", "5"))
    find_restart_checkpoint(folder, job, LOGGER)
    own = save(folder, 2)
    assert find_restart_checkpoint(folder, back, LOGGER) == own
    assert find_restart_checkpoint(folder, replace(back, process=(3, "a node", "9")), LOGGER) is None


def test_a_process_without_a_launcher_leaves_no_record(folder: Path):
    """A process without a launcher writes no launch record."""
    assert find_restart_checkpoint(folder, LaunchIdentity.here([AGENT], {}), LOGGER) is None
    assert [path.name for path in folder.iterdir()] == ["iter_100"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launch": {"color": 1}, "before": null}', '{"launch": {}}'])
def test_an_unreadable_record_is_ignored(folder: Path, text: str):
    """If the launch record is invalid, the run starts as configured."""
    (folder / ".launch.json").write_text(text)
    assert find_restart_checkpoint(folder, FIRST, LOGGER) is None


@pytest.mark.parametrize(
    ("environ", "script", "expected"),
    [
        ({}, None, "does not run in a SLURM job"),
        ({"SLURM_JOB_ID": "7"}, None, "scontrol is not on the PATH"),
        ({"SLURM_JOB_ID": "7"}, "echo Job is pending >&2; exit 1", "failed with status 1: Job is pending"),
    ],
)
def test_a_job_that_cannot_be_requeued_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, environ: dict[str, str], script: str | None, expected: str
):
    """If requeuing fails, the run still ends normally, because the checkpoint is saved; the log suggests what to do."""
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    assert not requeue_job(LOGGER, {**environ, "PATH": str(tmp_path)})
    assert expected in caplog.text
