"""Runs whose length is given in optimizer steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.errors import ConfigValueError
from tests.train.toys import At, Recorder, Toy, loader, train_until_signal

MakeRunner = Callable[..., Runner]


def optim(**changes: Any) -> dict[str, Any]:
    """Return an optimizer wrapper configuration that accumulates over three iterations."""
    return {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "accumulative_counts": 3, **changes}


def test_max_steps_counts_accumulation_windows(make_runner: MakeRunner) -> None:
    """Four steps of three iterations each are twelve iterations, across the end of an epoch of seven."""
    seen = Recorder()
    runner = make_runner(train_cfg={"max_steps": 4}, optim_wrapper=optim(), custom_hooks=[seen])
    runner.train()
    assert (len(seen.rows), runner.strategy.optim_wrapper.num_steps_applied) == (12, 4)


def test_a_schedule_by_step_ends_with_the_run(make_runner: MakeRunner) -> None:
    """A schedule by step without an end covers all steps of the run, with any accumulation."""
    schedule = {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.0, "by": "step"}
    seen = Recorder()
    make_runner(
        train_cfg={"max_steps": 4}, optim_wrapper=optim(), param_scheduler=schedule, custom_hooks=[seen]
    ).train()
    used = seen.rates[::3]
    assert used == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3, 0.0])


@pytest.mark.slow
def test_skipped_steps_are_made_up_for(make_runner: MakeRunner, tmp_path: Path) -> None:
    """If the step of one window is skipped because of non-finite gradients, the run takes one more window."""
    losses = []

    class Spoilt(Toy):
        def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
            out = super().forward(*args, mode=mode, **kwargs)
            if mode == "loss":
                losses.append(1)
                if len(losses) == 2:
                    out = {"loss": out["loss"] * torch.inf}
            return out

    runner = make_runner(
        model=Spoilt(), train_cfg={"max_steps": 3}, optim_wrapper=optim(nonfinite="skip"),
        default_hooks={"runtime_info": None, "logger": None, "checkpoint": {"by_epoch": False}},
    )  # fmt: skip
    runner.train()
    wrapper = runner.strategy.optim_wrapper
    assert (wrapper.num_steps_attempted, wrapper.num_steps_applied, runner.run.iter) == (4, 3, 12)
    assert runner.latest_checkpoint() == tmp_path / "run" / "iter_12"


@pytest.mark.slow
def test_a_run_by_steps_is_resumed_exactly(make_runner: MakeRunner, tmp_path: Path) -> None:
    """An interrupted and resumed run has the same iterations and losses as the uninterrupted one."""
    whole = Recorder()
    make_runner(
        train_cfg={"max_steps": 4}, optim_wrapper=optim(), custom_hooks=[whole], work_dir=tmp_path / "whole"
    ).train()
    pieces = Recorder()
    stop = At(5, lambda run: os.kill(os.getpid(), signal.SIGINT))
    train_until_signal(make_runner(train_cfg={"max_steps": 4}, optim_wrapper=optim(), custom_hooks=[pieces, stop]))
    again = make_runner(train_cfg={"max_steps": 4}, optim_wrapper=optim(), custom_hooks=[pieces], resume=True)
    again.train()
    assert pieces.rows == whole.rows
    assert again.strategy.optim_wrapper.num_steps_applied == 4


@pytest.mark.parametrize("length", [{"max_steps": 2, "max_iters": 5}, {"max_steps": 0}, {"by_epoch": False}])
def test_an_invalid_length_is_rejected(make_runner: MakeRunner, length: dict[str, Any]) -> None:
    """Two lengths, no length, and a length of zero are rejected before training."""
    with pytest.raises(ConfigValueError, match="max_steps"):
        make_runner(train_cfg=length, optim_wrapper=optim()).train()


def test_the_log_shows_iterations_and_steps(make_runner: MakeRunner, capsys: pytest.CaptureFixture[str]) -> None:
    """With gradient accumulation, each log line has the iteration and the optimizer step."""
    hooks = {"runtime_info": None, "checkpoint": None, "logger": {"interval": 6}}
    make_runner(
        train_cfg={"max_steps": 4}, optim_wrapper=optim(), default_hooks=hooks, log_level="INFO",
        train_dataloader=loader(),
    ).train()  # fmt: skip
    assert "Iter(train) [ 6/12]  step: 2/4  lr" in capsys.readouterr().err
