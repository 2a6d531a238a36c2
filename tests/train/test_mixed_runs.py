"""Runs with several optimizers for different parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stratagem import Runner
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.train.hooks import EMAHook
from stratagem.train.tools import find_learning_rate
from stratagem.train.tools.schedule_preview import preview_run
from tests.train.toys import QUIET_HOOKS, At, Toy, loader, stop

MakeRunner = Callable[..., Runner]
OPTIM: dict[str, Any] = {
    "optimizer": {
        "type": "MixedOptimizer",
        "parts": {"muon": {"type": "Muon", "lr": 0.02}, "adamw": {"type": "AdamW", "lr": 0.01}},
        "hidden_matrices": "muon",
        "others": "adamw",
    }
}
SCHEDULE = [
    {"type": "LinearLR", "part": "muon", "start_factor": 0.1, "by_epoch": False, "end": 7},
    {"type": "CosineAnnealingLR", "by_epoch": False, "eta_min": 0.001},
]


@pytest.mark.slow
def test_a_run_with_averaged_weights_resumes_exactly_and_logs_the_rate_of_each_part(
    make_runner: MakeRunner, tmp_path: Path
):
    """Weights and averages of a run that was stopped and resumed equal those of an uninterrupted one, bit by bit."""
    changes: dict[str, Any] = {
        "optim_wrapper": OPTIM,
        "param_scheduler": SCHEDULE,
        "default_hooks": {**QUIET_HOOKS, "logger": {"interval": 1}, "checkpoint": {"by_epoch": False, "interval": 5}},
    }

    def run(folder: str, *hooks: Any, **more: Any) -> Runner:
        average = {"type": "EMAHook", "momentum": 0.3}
        runner = make_runner(work_dir=tmp_path / folder, custom_hooks=[average, *hooks], **changes, **more)
        runner.train()
        return runner

    whole = run("whole")
    run("part", At(10, stop))
    resumed = run("part", resume=True)
    assert resumed.run.iter == whole.run.iter == 21
    for name, value in whole.strategy.model.state_dict().items():
        assert torch.equal(resumed.strategy.model.state_dict()[name], value)
    averages = [
        next(hook for hook in each.run.events.hooks if isinstance(hook, EMAHook)).average for each in (whole, resumed)
    ]
    for name, value in averages[0].averages.items():
        assert torch.equal(averages[1].averages[name], value)
    (path,) = (tmp_path / "whole").glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rates = [(row["muon.lr"], row["adamw.lr"]) for row in rows if row.get("mode") == "train"]
    assert rates[0] == (pytest.approx(0.002), pytest.approx(0.01))
    assert len(rates) == 21


def test_schedules_are_plotted_for_each_part():
    """Every part has its own curves, which start at its learning rate and end at ``eta_min``."""
    preview = preview_run(
        {"type": Toy},
        optim_wrapper={**OPTIM, "accumulative_counts": 2},
        train_dataloader=loader(),
        train_cfg={"by_epoch": True, "max_epochs": 3},
        param_scheduler=[{"type": "CosineAnnealingLR", "by": "step", "T_max": 10, "eta_min": 0.001}],
    )
    rates = {course.optimizer: course for course in preview.courses if course.key == "lr"}
    first = {name: course.values[0] for name, course in rates.items()}
    assert first == {"muon": pytest.approx(0.02), "adamw": pytest.approx(0.01)}
    assert rates["muon"].parameters == ("layers.0.weight",)
    for course in rates.values():
        np.testing.assert_allclose(course.values[-1], 0.001)
        assert course.values[0] == course.values[1] != course.values[2]


def test_the_learning_rate_of_one_part_can_be_searched(make_runner: MakeRunner):
    """The rate of the named part is varied, the other part keeps its rate, and an unknown part is refused."""
    runner = make_runner(optim_wrapper=OPTIM)
    data = runner.prepare().dataloader
    strategy, seen = runner.strategy, []
    step = strategy.optim_wrapper.optimizer.step

    def recorded() -> None:
        seen.append({name: rates[0] for name, rates in strategy.optim_wrapper.get_lr().items()})
        step()

    strategy.optim_wrapper.optimizer.step = recorded
    find_learning_rate(strategy, data, low=1e-4, high=1e-2, steps=5, optimizer="muon")
    assert [row["muon.lr"] for row in seen] == pytest.approx(np.geomspace(1e-4, 1e-2, 5)[: len(seen)].tolist())
    assert {row["adamw.lr"] for row in seen} == {0.01}
    with pytest.raises(ConfigValueError, match="set optimizer to one of muon, adamw"):
        find_learning_rate(strategy, data)
    with pytest.raises(ConfigKeyError, match="Did you mean 'muon'"):
        find_learning_rate(strategy, data, optimizer="moun")


def test_the_log_of_a_run_contains_the_assignment_once(make_runner: MakeRunner, tmp_path: Path):
    """The log of a run reports which parameters belong to each part when the optimizer is built, and never again."""
    make_runner(optim_wrapper=OPTIM, log_level="INFO").train()
    (path,) = (tmp_path / "run").glob("*/*.log")
    (line,) = (each for each in path.read_text().splitlines() if "MixedOptimizer" in each)
    assert line.endswith(
        "MixedOptimizer: muon (Muon) updates 1 parameter with 32 elements: layers.0.weight; adamw (AdamW) updates 3 parameters "
        "with 35 elements: layers.0.bias, layers.3.weight, layers.3.bias. Not hidden matrices: layers.3.weight (output layer)."
    )
