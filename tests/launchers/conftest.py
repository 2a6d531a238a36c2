"""Runs that other runs are compared with, and the machinery of real launchers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import STRATAGEM, Jobs, facts, jobs_in, train
from slurm import Slurm, running_slurm


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Starts commands in the test's folder."""
    with jobs_in(tmp_path) as jobs:
        yield jobs


@pytest.fixture
def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks come to that `stratagem train --nproc 2` started."""
    folder = tmp_path_factory.mktemp("nproc")
    with jobs_in(folder) as jobs:
        jobs.run([*STRATAGEM, *train("run", "--nproc", "2")[1:]])
    return facts(folder / "run")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM cluster of one node, this machine, on loopback."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm
