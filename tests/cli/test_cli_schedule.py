"""Schedules are drawn without training and without a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def test_the_learning_rate_is_drawn_over_the_whole_run(stratagem: Command, config: str, tmp_path: Path):
    """20 samples in batches of 4 are 5 iterations, 2 epochs are 10; what stays is said."""
    done = stratagem("schedule", config)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[:2] == [config, "10 iterations, 2 epochs of 5"]
    assert "learning rate" in lines
    assert any(line.split() == ["iteration", "0", "2", "5", "8", "10"] for line in lines)
    assert any(line.split() == ["epoch", "0", "0.5", "1", "1.5", "2"] for line in lines)
    # The warm-up from half of 0.01, and the rate that it reaches.
    assert any(line.lstrip().startswith("0.01 ┤") for line in lines)
    assert any(line.lstrip().startswith("0.005 ┤") for line in lines)
    assert lines[-1] == "Constant: momentum 0.9, weight decay 0.01."
    assert list(tmp_path.iterdir()) == []


def test_what_a_schedule_changes_has_a_panel_of_its_own(stratagem: Command, config: str):
    """In the order of the optimizer's options; groups with equal values are one line, others are told apart."""
    done = stratagem(
        "schedule",
        config,
        "--set", "optim_wrapper.optimizer.weight_decay=0.1",
        "--set", "optim_wrapper.paramwise_cfg={bias_decay_mult: 0.5}",
        "--set", "param_scheduler=[{type: LinearMomentum, start_factor: 0.5}, "
        "{type: ConstantParamScheduler, param_name: weight_decay, factor: 0.5}]",
    )  # fmt: skip
    assert done.status == 0, done.err
    heads = [line for line in done.out.splitlines() if line.startswith(("learning", "momentum", "weight"))]
    assert heads == [
        "learning rate",
        "momentum",
        "weight decay  ● network.0.weight and 1 more  ● network.0.bias and 1 more",
    ]


def test_units_and_processes_are_named(stratagem: Command, config: str):
    """Two processes have 3 batches each; the optimizer steps every 2 of them; no process is started."""
    done = stratagem("schedule", config, "--nproc", "2", "--set", "optim_wrapper.accumulative_counts=2")
    assert done.status == 0, done.err
    assert "6 iterations, 2 epochs of 3, 2 processes" in done.out
    assert "iteration (micro-batch; optimizer step every 2)" in done.out


def test_scaled_rates_are_what_is_drawn(stratagem: Command, config: str):
    """With a sentence that says so."""
    done = stratagem("schedule", config, "--set", "auto_scale_lr={enable: true, base_batch_size: 2}")
    assert "0.02 ┤" in done.out
    assert "Learning rates multiplied by 2: the real batch is 4" in done.out


def test_a_schedule_that_follows_metrics_is_drawn_flat_and_said_so(stratagem: Command, config: str):
    """Nobody knows the metrics of a training that was not done."""
    done = stratagem("schedule", config, "--set", "param_scheduler=[{type: ReduceOnPlateauLR}]")
    assert "ReduceOnPlateauLR follows the metrics of validation" in done.out


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("train_cfg=None", ("no train_cfg", "no training to look at")),
        ("param_scheduler.0.type=LinerLR", ("'LinerLR'", "'LinearLR'")),
        ("param_schedulers=[]", ("'param_schedulers'", "'param_scheduler'")),
    ],
)
def test_a_configuration_that_cannot_be_drawn(stratagem: Command, config: str, override: str, texts: tuple[str, ...]):
    """Its slips are found as in training."""
    done = stratagem("schedule", config, "--set", override)
    assert done.status == 2
    for text in texts:
        assert text in done.err


def test_a_file_is_drawn_where_asked(stratagem: Command, config: str, tmp_path: Path):
    """A PNG, and nothing else."""
    pytest.importorskip("matplotlib")
    done = stratagem("schedule", config, "--out", "drawn.png")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "Drawn to drawn.png"
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written(stratagem: Command, config: str):
    """Its path, and what to do."""
    pytest.importorskip("matplotlib")
    done = stratagem("schedule", config, "--out", "not/there/drawn.png")
    assert done.status == 2
    assert "not/there" in done.err


def test_without_matplotlib_the_extra_is_named(
    stratagem: Command, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The command that installs it; the terminal needs nothing."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert stratagem("schedule", config).status == 0
    done = stratagem("schedule", config, "--out", "drawn.png")
    assert done.status == 2
    assert "pip install stratagem[plot]" in done.err
    assert list(tmp_path.iterdir()) == []
