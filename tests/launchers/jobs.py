"""Start commands as users do, wait for what they write, and read what their ranks recorded."""

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
DEADLINE_S = 240.0  # for a machine that has much else to do; a run takes 10 s otherwise

# What would make a process that a test starts look like one of a launch around the tests.
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
    """Return where a program is; without it the test is skipped, or fails where launchers are required."""
    found = shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        miss(f"{command} is not installed; `make test-launch` installs it where it may")
    return str(found)


def miss(reason: str) -> None:
    """Skip a test that cannot run here, unless STRATAGEM_REQUIRE_LAUNCHERS says that all have to."""
    if os.environ.get("STRATAGEM_REQUIRE_LAUNCHERS"):
        pytest.fail(reason)
    pytest.skip(reason)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a user's shell in which the package can be imported, whatever started the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name not in _FOREIGN_NAMES
    }
    source = str(Path(package.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


def train(work_dir: str, *more: str) -> list[str]:
    """Return the words of the command that trains the digits; those after ``-m`` are a module's."""
    return ["stratagem", "train", CONFIG, "--work-dir", work_dir, *more]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> None:
    """Wait for a condition; fail with ``what`` if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Job:
    """A command that runs."""

    process: subprocess.Popen[str]
    log: Path

    def wait(self, seconds: float = DEADLINE_S) -> int:
        """Return its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process.args} did not end within {seconds:g} s:\n{self.output()}")

    def output(self) -> str:
        """Return all that it has printed."""
        return self.log.read_text(errors="replace")

    def succeed(self) -> str:
        """Wait for a good end; return the output."""
        status = self.wait()
        assert status == 0, f"status {status}\n{self.output()}"
        return self.output()

    def kill(self) -> None:
        """End it and all that it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Jobs:
    """Starts commands in a folder; whatever still runs in the end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Job] = []

    def start(self, words: Sequence[str], **environ: str) -> Job:
        """Start a command; its output goes to a file."""
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
        """Run a command to its good end; return its output."""
        return self.start(words, **environ).succeed()

    def close(self) -> None:
        """Kill what still runs."""
        for job in self._started:
            job.kill()


@contextmanager
def jobs_in(folder: Path) -> Iterator[Jobs]:
    """Start commands in a folder while the context lasts."""
    jobs = Jobs(folder)
    try:
        yield jobs
    finally:
        jobs.close()


def records(work_dir: Path, size: int = 2) -> list[dict[str, Any]]:
    """Return what each rank of a run wrote."""
    return [json.loads((work_dir / f"rank_{rank}.json").read_text()) for rank in range(size)]


def facts(work_dir: Path, size: int = 2) -> list[dict[str, Any]]:
    """Return what each rank of a run computed, which neither launcher nor host may change."""
    own = {"launcher", "host"}
    return [{key: value for key, value in record.items() if key not in own} for record in records(work_dir, size)]
