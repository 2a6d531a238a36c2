"""The command line in processes of its own: signals, several ranks, and what the shell sees."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import stratagem as package
from stratagem.checkpoint import CheckpointLoader

pytestmark = pytest.mark.slow

_DEADLINE_S = 120


class Shell:
    """Starts commands in a folder; what still runs in the end is killed with all that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        source = str(Path(package.__file__).parents[1])
        self.environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "stratagem", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: str) -> tuple[int, str]:
        """Return the status and all output of a command."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=_DEADLINE_S)
        return process.returncode, output

    def interrupt(self, *words: str) -> tuple[int, str]:
        """Press Ctrl-C when the first line of training is there; return status and output."""
        process = self.start(*words)
        seen = []
        give_up = time.monotonic() + _DEADLINE_S
        for line in process.stdout:
            seen.append(line)
            if "loss:" in line or time.monotonic() > give_up:
                break
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=_DEADLINE_S)
        return process.returncode, "".join(seen) + output


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in an empty folder."""
    shell = Shell(tmp_path)
    yield shell
    for process in shell.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state in a checkpoint."""
    return CheckpointLoader.load_checkpoint(path)["state_dict"]


LONG = (
    "--set",
    "train_cfg.max_epochs=120",
    "--set",
    "train_cfg.val_interval=120",
    "--set",
    "default_hooks.checkpoint.interval=-1",
)


def test_ctrl_c_and_resume_come_to_the_same_weights(
    shell: Shell, stratagem: Callable[..., Any], config: str, tmp_path: Path
):
    """Stopped wherever the signal came, with status 130 and no traceback; bit for bit the undisturbed run."""
    assert stratagem("train", config, "--work-dir", "whole", *LONG).status == 0
    status, output = shell.interrupt("train", config, "--work-dir", "cut", *LONG)
    assert status == 130, output
    assert "Traceback" not in output
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert 0 < done < 600
    assert output.splitlines()[-1].split(maxsplit=1)[1].startswith("python -m stratagem train ")
    status, output = shell.run("train", config, "--work-dir", "cut", *LONG, "--resume")
    assert status == 0, output
    whole, cut = weights(tmp_path / "whole" / "epoch_120"), weights(tmp_path / "cut" / "epoch_120")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_a_mistake_in_several_ranks_is_told_once(shell: Shell, config: str):
    """Without the launcher's own report of it, and with the status of one process."""
    status, output = shell.run("train", config, "--nproc", "2", "--set", "model.type=SupervisdModel")
    assert status == 2, output
    assert output.count("'SupervisdModel'") == 1
    assert "torch/distributed" not in output


def test_two_ranks_train_stop_and_go_on(shell: Shell, config: str, tmp_path: Path):
    """20 samples in 2 ranks' batches of 4 are 3 iterations an epoch; Ctrl-C stops both after the same one."""
    ranks = ("--work-dir", "run", "--nproc", "2", *LONG)
    status, output = shell.interrupt("train", config, *ranks)
    assert status == 130, output
    assert "Traceback" not in output
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert done % 10 == 0
    assert (tmp_path / "run" / f"iter_{done}").is_dir()
    assert "--nproc 2" in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("--resume")
    status, output = shell.run("train", config, *ranks, "--resume")
    assert status == 0, output
    assert f"Going on after epoch {done // 3}, iteration {done}" in output
    assert "Trained 120 epochs (360 iterations)" in output


def test_a_sweep_in_several_ranks_is_shown_once_and_leaves_nothing(shell: Shell, config: str, tmp_path: Path):
    """By rank 0; the folder stays empty."""
    status, output = shell.run("find", "lr", config, "--nproc", "2", "--steps", "6")
    assert status == 0, output
    assert output.count("learning-rate range test") == 1
    assert list(tmp_path.iterdir()) == []
