"""Ranks on a real Ray cluster with one node on the loopback interface."""

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

from tests.launchers.jobs import (
    CONFIG,
    PYTHON,
    STRATAGEM,
    Jobs,
    check_continued,
    facts,
    jobs_in,
    miss,
    records,
    wait_until,
)

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

RAY = (*STRATAGEM, "train", CONFIG, "--launcher", "ray", "--nproc")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster with two cores; returns the environment variables to connect to it."""
    if find_spec("ray") is None:
        miss("ray is not installed; `make test-launch` installs it")
    # pytest's folder would make the paths of the sockets too long.
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
            # Ray terminates the processes that it started.
            job.process.send_signal(signal.SIGTERM)
            job.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def test_ray(jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], cluster: dict[str, str]) -> None:
    """Ray starts the ranks, and the summary contains the command to resume."""
    output = jobs.run([*RAY, "2", "--work-dir", "run"], **cluster)
    assert facts(tmp_path / "run") == two_ranks
    assert [record["launcher"] for record in records(tmp_path / "run")] == ["ray", "ray"]
    assert "Trained 16 iterations" in output
    assert "--launcher ray --nproc 2" in output


def test_ctrl_c_saves_on_ray(
    jobs: Jobs, tmp_path: Path, two_ranks: list[dict[str, Any]], cluster: dict[str, str]
) -> None:
    """The signal reaches the ranks, which save a checkpoint; the resumed run ends with the same weights."""
    slowly = ("--set", "custom_hooks.0.pause_s=0.4")
    job = jobs.start([*RAY, "2", "--work-dir", "run", *slowly], **cluster)
    progress = tmp_path / "run" / "progress_0"
    wait_until(lambda: progress.exists() or job.process.poll() is not None, "an iteration")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 128 + signal.SIGINT, job.output()
    jobs.run([*RAY, "2", "--work-dir", "run", "--resume"], **cluster)
    check_continued(tmp_path / "run", job.output(), two_ranks)


def test_an_invalid_configuration_on_ray(jobs: Jobs, cluster: dict[str, str]) -> None:
    """The exit code for an invalid configuration is the same as in one process."""
    job = jobs.start([*RAY, "2", "--set", "model.type=SupervisdModel"], **cluster)
    assert job.wait() == 2, job.output()
    assert "SupervisdModel" in job.output()


def test_a_missing_cluster_is_reported(jobs: Jobs, cluster: dict[str, str], free_port: int) -> None:
    """Without a cluster, the error contains the command to start one."""
    job = jobs.start([*RAY, "2"], **{**cluster, "RAY_ADDRESS": f"127.0.0.1:{free_port}"})
    assert job.wait() == 2, job.output()
    assert "ray start --head" in job.output()
