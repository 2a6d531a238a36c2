"""Trainings of mmpretrain and mmsegmentation with their own ``tools/train.py``, on MMEngine and on Stratagem."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
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
    return os.environ | own | {"PYTHONPATH": os.pathsep.join([str(HERE / "startup"), os.environ.get("PYTHONPATH", "")])}


def arguments(training: Training, data: Path, work_dir: Path, options: Sequence[str]) -> list[str]:
    """Return the arguments of ``tools/train.py``."""
    given = [option.format(data=data) for option in (*training.options, *options)]
    return [str(training.config_path()), "--work-dir", str(work_dir), "--cfg-options", *given]


def run(command: Sequence[str], package: str, work_dir: Path) -> str:
    """Run a command in the working directory and return its output; fails with the output if the command does."""
    work_dir.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        command,
        cwd=work_dir,
        env=environment(package),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode} of {' '.join(command)}\n{result.stdout[-6000:]}"
    return result.stdout


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
    given = [*(["--resume"] if resume else []), *arguments(training, data, work_dir, options)]
    # --cfg-options takes all arguments up to the next one that starts with dashes.
    return run(command(engine, training.tool("train.py"), given[::1], ranks), training.package, work_dir)


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
        yield from map(json.loads, file.read_text().splitlines())


def losses(work_dir: Path) -> dict[int, float]:
    """Return the loss of each iteration; of an iteration that was repeated after a resume, the last one."""
    return {int(record["step"]): record["loss"] for record in scalars(work_dir) if "loss" in record}


def best(work_dir: Path) -> list[Path]:
    """Return the checkpoints with the best score."""
    return sorted(work_dir.glob("best_*"))
