"""Schedules are plotted without training and without leaving files behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.mark.slow
def test_the_learning_rate_is_plotted_over_the_whole_run(stratagem: Command, config: str, tmp_path: Path):
    """2 epochs of 20 samples in batches of 4 give 10 iterations; constant values are printed."""
    done = stratagem("schedule", config)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[:2] == [config, "10 iterations, 2 epochs of 5"]
    assert "learning rate" in lines
    assert any(line.split() == ["iteration", "0", "2", "5", "8", "10"] for line in lines)
    assert any(line.split() == ["epoch", "0", "0.5", "1", "1.5", "2"] for line in lines)
    # The warm-up from half of 0.01, and the final learning rate.
    assert any(line.lstrip().startswith("0.01 ┤") for line in lines)
    assert any(line.lstrip().startswith("0.005 ┤") for line in lines)
    assert lines[-1] == "Constant: momentum 0.9, weight decay 0.01."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_scheduled_option_has_a_panel(stratagem: Command, config: str):
    """Each scheduled option has a panel, and groups with different values have separate lines."""
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


@pytest.mark.slow
def test_units_and_processes_are_printed(stratagem: Command, config: str):
    """With two processes, an epoch has 3 batches, and the optimizer steps after every 2; no process is started."""
    done = stratagem("schedule", config, "--nproc", "2", "--set", "optim_wrapper.accumulative_counts=2")
    assert done.status == 0, done.err
    assert "6 iterations, 2 epochs of 3, 2 processes" in done.out
    assert "iteration (micro-batch; optimizer step every 2)" in done.out


def test_scaled_rates_are_plotted(stratagem: Command, config: str):
    """Scaled learning rates are plotted, with a note."""
    done = stratagem("schedule", config, "--set", "auto_scale_lr={enable: true, base_batch_size: 2}")
    assert "0.02 ┤" in done.out
    assert "Multiplied the learning rates by 2: the batch size is 4" in done.out


def test_a_schedule_that_depends_on_metrics_is_constant(stratagem: Command, config: str):
    """A schedule that depends on metrics is plotted as constant, with a note."""
    done = stratagem("schedule", config, "--set", "param_scheduler=[{type: ReduceOnPlateauLR}]")
    assert "ReduceOnPlateauLR depends on validation metrics" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("train_cfg=None", ("no train_cfg", "which training requires")),
        ("param_scheduler.0.type=LinerLR", ("'LinerLR'", "'LinearLR'")),
        ("param_schedulers=[]", ("'param_schedulers'", "'param_scheduler'")),
    ],
)
def test_an_invalid_configuration(stratagem: Command, config: str, override: str, texts: tuple[str, ...]):
    """Errors in the configuration are reported as in training."""
    done = stratagem("schedule", config, "--set", override)
    assert done.status == 2
    for text in texts:
        assert text in done.err


@pytest.mark.slow
def test_a_plot_is_written_on_request(stratagem: Command, config: str, tmp_path: Path):
    """`--out` writes a PNG and nothing else."""
    pytest.importorskip("matplotlib")
    done = stratagem("schedule", config, "--out", "chart.png")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "Saved the chart to chart.png"
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_unwritable_path(stratagem: Command, config: str):
    """The error for a path that is not writable contains it and what to do."""
    pytest.importorskip("matplotlib")
    done = stratagem("schedule", config, "--out", "missing/folder/chart.png")
    assert done.status == 2
    assert "missing/folder" in done.err


@pytest.mark.slow
def test_a_missing_matplotlib_is_reported(
    stratagem: Command, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without matplotlib, `--out` raises an error with the install command; the terminal plot still works."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert stratagem("schedule", config).status == 0
    done = stratagem("schedule", config, "--out", "chart.png")
    assert done.status == 2
    assert "pip install stratagem[plot]" in done.err
    assert list(tmp_path.iterdir()) == []
