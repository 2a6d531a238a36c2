"""Reference runs for comparison, and fixtures for real launchers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.jobs import STRATAGEM, Jobs, facts, jobs_in, train
from tests.launchers.slurm import Slurm, running_slurm


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Start commands in the folder of the test."""
    with jobs_in(tmp_path) as jobs:
        yield jobs


@pytest.fixture
def free_port() -> int:
    """A free port on the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two ranks that `stratagem train --nproc 2` started."""
    folder = tmp_path_factory.mktemp("nproc")
    with jobs_in(folder) as jobs:
        jobs.run([*STRATAGEM, *train("run", "--nproc", "2")[1:]])
    return facts(folder / "run")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM cluster with one node, this machine, on the loopback interface."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm
