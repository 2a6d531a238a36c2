"""Complete runs from the command line with ColossalAI: hooks, validation, checkpoints, and resuming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stratagem.checkpoint import list_checkpoints, read_any
from tests.support.ranks import scripts_environment

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]

TOYS = Path(__file__).parents[2] / "cli"
CONFIG = """
_base_ = ["{toys}/toy_config.py"]
{strategy}
optim_wrapper = dict(
    type="ColossalAIOptimWrapper",
    optimizer=dict(type="{optimizer}", lr=0.01),
    clip_grad=dict(max_norm=0.5),
    accumulative_counts=2,
)
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
work_dir = "{work_dir}"
"""
STRATEGY = (
    'strategy = dict(type="ColossalAIStrategy", plugin=dict(type="lowlevel-zero", stage=2), mixed_precision="bf16")'
)

AVERAGE = """
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
default_hooks = dict(checkpoint=dict(interval=1, save_best="accuracy"))
"""


def test_a_run_is_resumed_on_two_ranks_and_in_one_process(tmp_path: Path) -> None:
    """`stratagem train --nproc 2` trains and validates, `--resume` continues, and one process resumes the result."""
    config = _config(tmp_path / "run.py")
    first = _stratagem(tmp_path, "train", str(config), "--nproc", "2")
    assert "grad_norm" in first
    assert "Epoch(val) [2]" in first
    again = _stratagem(tmp_path, "train", str(config), "--nproc", "2", "--resume", "--set", "train_cfg.max_epochs=3")
    assert "Epoch(train) [3]" in again
    assert "Epoch(train) [1]" not in again
    last = list_checkpoints(tmp_path / "run")[0]
    # 20 samples in batches of 4 on 2 ranks are 3 iterations per epoch; the last of each epoch is its own window.
    assert last.position == {"epoch": 3, "iter": 9}
    assert read_any(last.path)["optimizer"]["counts"]["attempts"] == 5
    plain = _config(tmp_path / "plain.py", strategy="", optimizer="AdamW")
    # The results of two ranks are in the order of the data.
    for name, words in {"two": (config, "--nproc", "2"), "one": (plain,)}.items():
        _stratagem(tmp_path, "predict", str(words[0]), str(last.path), "--out", f"{name}.pt", *words[1:])
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert len(one) == 8
    assert [each["target"] for each in two] == [each["target"] for each in one]
    # The ranks compute in bfloat16.
    scores = [torch.stack([each["preds"].float() for each in results]) for results in (one, two)]
    torch.testing.assert_close(*scores, rtol=0.02, atol=0.02)
    resumed = _stratagem(tmp_path, "train", str(plain), "--resume", str(last.path), "--set", "train_cfg.max_epochs=4")
    assert "Epoch(train) [4]" in resumed


def test_the_colossalai_format_contains_averaged_weights(tmp_path: Path) -> None:
    """The best checkpoint has the training weights and their average next to the Booster's files, and resumes."""
    strategy = 'strategy = dict(type="ColossalAIStrategy", checkpoint_format="colossalai")\n' + AVERAGE
    config = _config(tmp_path / "run.py", strategy=strategy)
    _stratagem(tmp_path, "train", str(config), "--nproc", "2")
    best, regular = (read_any(tmp_path / "run" / name) for name in ("best_accuracy_epoch_1", "epoch_1"))
    averages = best["average"]["averages"]
    for name, weight in regular["state_dict"].items():
        assert torch.equal(best["state_dict"][name], weight)
        # The average starts with the only step of the first epoch.
        assert torch.equal(averages[name], weight)
    assert (tmp_path / "run" / "epoch_1" / "model" / "pytorch_model.bin.index.json").is_file()
    again = _stratagem(tmp_path, "train", str(config), "--nproc", "2", "--resume", "--set", "train_cfg.max_epochs=3")
    assert "Epoch(train) [3]" in again


def test_averaging_rounded_weights_is_rejected(tmp_path: Path) -> None:
    """EMAHook is rejected with bfloat16, because it would average rounded weights instead of the master weights."""
    config = _config(tmp_path / "run.py", strategy=STRATEGY + "\n" + AVERAGE)
    message = _stratagem(tmp_path, "train", str(config), "--nproc", "2", status=2)
    assert "EMAHook needs the master weights in the model" in message


def test_a_misspelled_option_is_rejected_by_config_check(tmp_path: Path) -> None:
    """`stratagem config check` knows the strategy's options."""
    config = _config(tmp_path / "typo.py", strategy=STRATEGY.replace("mixed_precision", "mixed_precison"))
    message = _stratagem(tmp_path, "config", "check", str(config), status=2)
    assert "takes no argument 'mixed_precison'. Did you mean 'mixed_precision'" in message


def _config(file: Path, strategy: str = STRATEGY, optimizer: str = "HybridAdam") -> Path:
    work_dir = file.with_suffix("")
    file.write_text(CONFIG.format(toys=TOYS, work_dir=work_dir, strategy=strategy, optimizer=optimizer))
    return file


def _stratagem(folder: Path, *arguments: str, status: int = 0) -> str:
    environment = scripts_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(TOYS), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "stratagem", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr
