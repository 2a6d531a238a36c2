"""Run commands in separate processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

import stratagem as package

HERE = Path(__file__).parent
_DEADLINE_S = 120


class Shell:
    """Start commands in a folder, and kill those that are still running at the end with their children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        source = str(Path(package.__file__).parents[1])
        # Data workers create sockets there, whose paths are limited to 107 characters.
        temporary = tempfile.TemporaryDirectory(prefix="shell-", ignore_cleanup_errors=True)
        self.temporary = Path(temporary.name)
        self._remove_temporary = temporary.cleanup
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([source, str(HERE)]),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "TMPDIR": temporary.name,
        }

    def start(self, *words: str, launch: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        """Start a command, optionally under a launcher, with additional environment variables."""
        process = subprocess.Popen(
            [sys.executable, *launch, "-m", "stratagem", *words],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: str, launch: Sequence[str] = (), **environment: str) -> tuple[int, str]:
        """Return the exit code and the output of a command."""
        process = self.start(*words, launch=launch, **environment)
        output, _ = process.communicate(timeout=_DEADLINE_S)
        return process.returncode, output

    def leftovers(self) -> list[str]:
        """Return the remains of commands: running processes in the folder, and temporary files."""
        # torch.compile keeps its cache there for the next process, and a data worker that is killed leaves its folder.
        left = [str(path) for path in self.temporary.iterdir() if not path.name.startswith(("torchinductor", "pymp-"))]
        for process in self._processes():
            with suppress(psutil.Error):
                left.append(f"{process.pid}: {process.cmdline()}")
        return left

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder):
                    yield process

    def interrupt(self, *words: str, **environment: str) -> tuple[int, str]:
        """Press Ctrl-C after the first training line; return the exit code and the output."""
        return self.signal(signal.SIGINT, *words, everywhere=True, **environment)

    def signal(self, number: int, *words: str, everywhere: bool = False, **environment: str) -> tuple[int, str]:
        """Send a signal after the first training line, to the process or to its whole group."""
        process = self.start(*words, **environment)
        seen = []
        give_up = time.monotonic() + _DEADLINE_S
        for line in process.stdout:
            seen.append(line)
            if "loss:" in line or time.monotonic() > give_up:
                break
        (os.killpg if everywhere else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=_DEADLINE_S)
        return process.returncode, "".join(seen) + output

    def close(self) -> None:
        """Kill all running commands, and remove their temporary files."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        # Ranks have their own process groups, and stopped ones do not notice that the launcher has exited.
        for left in self._processes():
            with suppress(psutil.Error):
                left.kill()
        self._remove_temporary()
