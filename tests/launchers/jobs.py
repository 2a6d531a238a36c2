"""Start commands as users do, wait for their output, and read the records of their ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import stratagem as package

HERE = Path(__file__).parent
CONFIG = str(HERE / "digits_run.py")
PYTHON = sys.executable
STRATAGEM = (PYTHON, "-m", "stratagem")
DEADLINE_S = 240.0  # on a busy machine; a run usually takes 10 s

# Variables of a launcher that runs the tests themselves, which must not reach the started processes.
_FOREIGN = ("SLURM_", "OMPI_", "PMIX_", "TORCHELASTIC_", "STRATAGEM_")
_FOREIGN_NAMES = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
}


def need(command: str) -> str:
    """Return the path of a program; if it is missing, skip the test, or fail if launchers are required."""
    found = shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        miss(f"{command} is not installed; `make test-launch` installs it if possible")
    return str(found)


def miss(reason: str) -> None:
    """Skip a test that cannot run here, or fail if STRATAGEM_REQUIRE_LAUNCHERS is set."""
    if os.environ.get("STRATAGEM_REQUIRE_LAUNCHERS"):
        pytest.fail(reason)
    pytest.skip(reason)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a user's shell, without variables of the test runner, in which the package is importable."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name not in _FOREIGN_NAMES
    }
    source = str(Path(package.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, inherited.get("PYTHONPATH"))))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


def train(work_dir: str, *more: str) -> list[str]:
    """Return the command that trains on the digits; without its first word, it can follow ``python -m stratagem``."""
    return ["stratagem", "train", CONFIG, "--work-dir", work_dir, *more]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> None:
    """Wait for a condition; fail with ``what`` after a timeout."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"timed out after {seconds:g} s while waiting for: {what}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Job:
    """A running command."""

    process: subprocess.Popen[str]
    log: Path

    def wait(self, seconds: float = DEADLINE_S) -> int:
        """Wait for the command and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process.args} did not exit within {seconds:g} s:\n{self.output()}")

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    def succeed(self) -> str:
        """Wait until the command succeeds and return its output."""
        status = self.wait()
        assert status == 0, f"exit code {status}\n{self.output()}"
        return self.output()

    def kill(self) -> None:
        """Kill the command and all processes in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Jobs:
    """Start commands in a folder, and kill those that are still running at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Job] = []

    def start(self, words: Sequence[str], **environ: str) -> Job:
        """Start a command and redirect its output to a file."""
        log = self.folder / f"output_{len(self._started)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                list(words),
                cwd=self.folder,
                env=environment(**environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        job = Job(process, log)
        self._started.append(job)
        return job

    def run(self, words: Sequence[str], **environ: str) -> str:
        """Run a command until it succeeds and return its output."""
        return self.start(words, **environ).succeed()

    def close(self) -> None:
        """Kill all running commands."""
        for job in self._started:
            job.kill()


@contextmanager
def jobs_in(folder: Path) -> Iterator[Jobs]:
    """Start commands in a folder, and kill them at the end of the block."""
    jobs = Jobs(folder)
    try:
        yield jobs
    finally:
        jobs.close()


def records(work_dir: Path, size: int = 2) -> list[dict[str, Any]]:
    """Return the record of each rank of a run."""
    return [json.loads((work_dir / f"rank_{rank}.json").read_text()) for rank in range(size)]


def facts(work_dir: Path, size: int = 2) -> list[dict[str, Any]]:
    """Return the results of each rank of a run, which must not depend on the launcher or host."""
    own = {"launcher", "host"}
    return [{key: value for key, value in record.items() if key not in own} for record in records(work_dir, size)]


def check_continued(work_dir: Path, log: str, expected: list[dict[str, Any]]) -> None:
    """Compare a resumed run, which was interrupted according to its log, with an uninterrupted one, bit for bit."""
    done = int(log.split("Interrupted after ")[1].split(maxsplit=1)[0])
    assert 0 < done < len(expected[0]["losses"])
    for record, whole in zip(records(work_dir), expected, strict=True):
        assert record["samples"] == whole["samples"][done:]
        assert record["losses"] == whole["losses"][done:]
        assert record["weights"] == whole["weights"]
