"""Trainings of mmpretrain and mmsegmentation with their own ``tools/train.py``, on MMEngine and on Stratagem."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

HERE = Path(__file__).parent
ENGINES = ("mmengine", "stratagem")
Engine = Literal["mmengine", "stratagem"]
TIMEOUT_S = 420


@dataclass(frozen=True)
class Training:
    """A shipped configuration, and the options that a user gives to ``tools/train.py`` to train it on other data.

    Options may contain ``{data}``, the folder of the pictures.
    """

    package: str
    config: str
    data: Callable[..., Path]
    options: tuple[str, ...]

    def config_path(self) -> Path:
        """Return the path of the configuration, which is in the package or in this folder."""
        own = HERE / "configs" / self.config
        return own if own.exists() else _package_data(self.package) / "configs" / self.config

    def tool(self, name: str) -> Path:
        """Return the path of a script in the package's folder of tools."""
        return _package_data(self.package) / "tools" / name


def _package_data(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None, f"{package} is not installed"
    return Path(spec.origin).parent / ".mim"


def command(engine: Engine, script: Path, arguments: Sequence[str], ranks: int = 1) -> list[str]:
    """Return the command that runs a script with MMEngine, or with Stratagem in its place, on a number of ranks."""
    program = [str(script)] if engine == "mmengine" else ["-m", "stratagem", "run-mmengine", str(script)]
    if ranks == 1:
        return [sys.executable, *program, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    return [sys.executable, *launcher, sys.executable, *program, *arguments, "--launcher", "pytorch"]


def environment(package: str) -> dict[str, str]:
    """Return the environment variables of a training: one thread, no GPU, and what the packages need at startup."""
    own = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DECLARE_MMCV_OPERATORS=str(int(package == "mmseg")))
    # Without it, MMEngine 0.10.7 cannot read its own checkpoints with torch 2.6 and later.
    own["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return os.environ | own | {"PYTHONPATH": os.pathsep.join([str(HERE / "startup"), os.environ.get("PYTHONPATH", "")])}


def arguments(training: Training, data: Path, work_dir: Path, options: Sequence[str]) -> list[str]:
    """Return the arguments of ``tools/train.py``."""
    given = [option.format(data=data) for option in (*training.options, *options)]
    return [str(training.config_path()), "--work-dir", str(work_dir), "--cfg-options", *given]


def run(command: Sequence[str], package: str, work_dir: Path) -> str:
    """Run a command in the working directory and return its output; fails with the output if the command does."""
    with _started(command, package, work_dir) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, f"exit code {process.returncode} of {' '.join(command)}\n{output[-6000:]}"
    return output


@contextmanager
def _started(command: Sequence[str], package: str, work_dir: Path) -> Iterator[subprocess.Popen[str]]:
    work_dir.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command,
        cwd=work_dir,
        env=environment(package),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        _kill(process.pid)
        process.wait()


def _kill(pid: int) -> None:
    """Send SIGKILL to a process and to the processes that it started, such as the ranks of a launcher."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def train(
    training: Training,
    engine: Engine,
    data: Path,
    work_dir: Path,
    options: Sequence[str] = (),
    *,
    ranks: int = 1,
    resume: bool = False,
) -> str:
    """Train with the package's ``tools/train.py`` and return its output."""
    return run(_train_command(training, engine, data, work_dir, options, ranks, resume), training.package, work_dir)


def train_and_kill(
    training: Training,
    engine: Engine,
    data: Path,
    work_dir: Path,
    options: Sequence[str] = (),
    *,
    iteration: int,
    ranks: int = 1,
) -> None:
    """Train, and kill all processes with SIGKILL as soon as the losses of a number of iterations are logged."""
    command = _train_command(training, engine, data, work_dir, options, ranks, resume=False)
    with _started(command, training.package, work_dir) as process:
        # Otherwise, the process would stop when the pipe is full.
        reader = threading.Thread(target=process.communicate, daemon=True)
        reader.start()
        deadline = time.monotonic() + TIMEOUT_S
        while len(losses(work_dir)) < iteration:
            assert process.poll() is None, f"the training ended with exit code {process.returncode}"
            assert time.monotonic() < deadline, f"{len(losses(work_dir))} iterations in {TIMEOUT_S} s"
            time.sleep(0.05)
        _kill(process.pid)
        reader.join()


def _train_command(
    training: Training, engine: Engine, data: Path, work_dir: Path, options: Sequence[str], ranks: int, resume: bool
) -> list[str]:
    # --cfg-options takes all arguments up to the next one that starts with dashes.
    config, *rest = arguments(training, data, work_dir, options)
    given = [config, *(["--resume"] if resume else []), *rest]
    return command(engine, training.tool("train.py"), given, ranks)


def test(
    training: Training, engine: Engine, data: Path, work_dir: Path, checkpoint: Path, options: Sequence[str] = ()
) -> str:
    """Test a checkpoint with the package's ``tools/test.py`` and return its output."""
    config, *rest = arguments(training, data, work_dir, options)
    given = [config, str(checkpoint), *rest]
    return run(command(engine, training.tool("test.py"), given), training.package, work_dir)


def scalars(work_dir: Path) -> Iterator[dict[str, float]]:
    """Yield the records of all sessions of a training, in the order in which they were written."""
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        # The last line is incomplete if the process was killed, or is being written.
        yield from (json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n"))


def losses(work_dir: Path) -> dict[int, float]:
    """Return the loss of each iteration; of an iteration that was repeated after a resume, the last one."""
    return {int(record["step"]): record["loss"] for record in scalars(work_dir) if "loss" in record}


def scores(work_dir: Path, metric: str) -> list[float]:
    """Return the values of a metric in the order of the validations."""
    return [record[metric] for record in scalars(work_dir) if metric in record]


def best(work_dir: Path) -> list[Path]:
    """Return the checkpoints with the best score."""
    return sorted(work_dir.glob("best_*"))
