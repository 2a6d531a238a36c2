"""Ranks on a Ray cluster: a real one, of one node on loopback."""

from __future__ import annotations

import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, PYTHON, STRATAGEM, Jobs, facts, jobs_in, miss, records, wait_until

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

RAY = (*STRATAGEM, "train", CONFIG, "--launcher", "ray", "--nproc")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster with two cores; what a user's shell has set to reach it."""
    if find_spec("ray") is None:
        miss("ray is not installed; `make test-launch` installs it")
    # Not below pytest's folder: its sockets' names have to be short.
    folder = tempfile.mkdtemp(prefix="ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = [
        "--head",
        "--block",
        "--num-cpus=2",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--temp-dir={folder}",
    ]
    own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with jobs_in(tmp_path_factory.mktemp("ray")) as jobs:
        job = jobs.start([PYTHON, "-m", "ray.scripts.scripts", "start", *start, "--include-dashboard=false"], **own)
        try:
            wait_until(lambda: "Ray runtime started" in job.output() or job.process.poll() is not None, "Ray", 90)
            assert job.process.poll() is None, job.output()
            yield own
        finally:
            # It ends what it started itself.
            job.process.send_signal(signal.SIGTERM)
            job.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def test_ray(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], cluster: dict[str, str]) -> None:
    """Ray starts the ranks; the summary names the command that goes on."""
    output = jobs.run([*RAY, "2", "--work-dir", "run"], **cluster)
    assert facts(tmp_path / "run") == two_ranks
    assert [record["launcher"] for record in records(tmp_path / "run")] == ["ray", "ray"]
    assert "Trained 16 iterations" in output
    assert "--launcher ray --nproc 2" in output


def test_ctrl_c_saves_on_ray(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], cluster: dict[str, str]
) -> None:
    """The signal reaches the ranks: they save, and the run goes on from there to the same weights."""
    slowly = ("--set", "custom_hooks.0.pause_s=0.4")
    job = jobs.start([*RAY, "2", "--work-dir", "run", *slowly], **cluster)
    progress = tmp_path / "run" / "progress_0"
    wait_until(lambda: progress.exists() or job.process.poll() is not None, "an iteration")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 128 + signal.SIGINT, job.output()
    assert "Interrupted after 10 of 16 iterations" in job.output()
    jobs.run([*RAY, "2", "--work-dir", "run", "--resume"], **cluster)
    for record, expected in zip(records(tmp_path / "run"), two_ranks, strict=True):
        assert record["losses"] == expected["losses"][10:]
        assert record["weights"] == expected["weights"]


def test_a_mistake_on_ray(jobs: Jobs, cluster: dict[str, str]) -> None:
    """The status is that of one process."""
    job = jobs.start([*RAY, "2", "--set", "model.type=SupervisdModel"], **cluster)
    assert job.wait() == 2, job.output()
    assert "SupervisdModel" in job.output()


def test_no_cluster(jobs: Jobs, cluster: dict[str, str], free_port: int) -> None:
    """The error says how to start one."""
    job = jobs.start([*RAY, "2"], **{**cluster, "RAY_ADDRESS": f"127.0.0.1:{free_port}"})
    assert job.wait() == 2, job.output()
    assert "ray start --head" in job.output()
