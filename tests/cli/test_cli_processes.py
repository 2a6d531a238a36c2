"""The command line in separate processes: signals, several ranks, and exit codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import CheckpointLoader
from tests.cli.shell import Shell

pytestmark = pytest.mark.slow


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


def test_ctrl_c_and_resume_give_the_same_weights(
    shell: Shell, stratagem: Callable[..., Any], config: str, tmp_path: Path
):
    """Ctrl-C exits with 130 without a traceback, and the resumed run is bit-identical to an uninterrupted one."""
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


def test_a_common_error_of_several_ranks_is_printed_once(shell: Shell, config: str):
    """An error on all ranks is printed once, without the launcher's report, with the exit code of one process."""
    status, output = shell.run("train", config, "--nproc", "2", "--set", "model.type=SupervisdModel")
    assert status == 2, output
    assert output.count("'SupervisdModel'") == 1
    assert "torch/distributed" not in output


def test_two_ranks_train_stop_and_resume(shell: Shell, config: str, tmp_path: Path):
    """20 samples on 2 ranks in batches of 4 give 3 iterations per epoch, and Ctrl-C stops both ranks after the same one."""
    ranks = ("--work-dir", "run", "--nproc", "2", *LONG)
    status, output = shell.interrupt("train", config, *ranks)
    assert status == 130, output
    assert "Traceback" not in output
    done = int(output.split("Interrupted after ")[1].split()[0])
    assert (tmp_path / "run" / f"iter_{done}").is_dir()
    assert "--nproc 2" in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("--resume")
    status, output = shell.run("train", config, *ranks, "--resume")
    assert status == 0, output
    assert f"Resumed after epoch {done // 3}, iteration {done}" in output
    assert "Trained 120 epochs (360 iterations)" in output


def test_a_sweep_on_several_ranks_is_printed_once(shell: Shell, config: str, tmp_path: Path):
    """Only rank 0 prints the sweep, and the folder stays empty."""
    status, output = shell.run("find", "lr", config, "--nproc", "2", "--steps", "6")
    assert status == 0, output
    assert output.count("learning-rate range test") == 1
    assert list(tmp_path.iterdir()) == []
