"""Tests of accumulation windows that are incomplete when a run stops."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from tests.support.ranks import Ranks
from tests.train.toys import EPOCH, VALIDATION, At, Recorder, settings, stop, train_until_signal

MakeRunner = Callable[..., Runner]
OPTIM = {
    "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "accumulative_counts": 4},
    "param_scheduler": {"type": "CosineAnnealingLR", "by_epoch": False},
}
LENGTHS = [{"max_epochs": 3}, {"max_iters": 17, "val_interval": 5}]


def interrupt(run: Any) -> None:
    """Send SIGINT, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("train_cfg", LENGTHS, ids=str)
def test_a_stop_by_a_hook_discards_the_unfinished_window(make_runner: MakeRunner, train_cfg: dict):
    """After 6 iterations in windows of 4, only the first optimizer step was applied and no gradient is left."""
    runner = make_runner(custom_hooks=[At(6, stop)], train_cfg=train_cfg, **OPTIM)
    runner.train()
    optim, model = runner.strategy.optim_wrapper, runner.strategy.model
    assert (runner.run.iter, optim.num_steps_applied, optim.pending_micro_batches) == (6, 1, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    four = make_runner(custom_hooks=[At(4, stop)], train_cfg=train_cfg, **OPTIM)
    four.train()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), four.strategy.model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("train_cfg", LENGTHS, ids=str)
@pytest.mark.parametrize("at", [1, 4, 6, EPOCH, 13, 16])
def test_an_interrupted_run_finishes_its_window_and_resumes_exactly(
    make_runner: MakeRunner, tmp_path: Path, train_cfg: dict, at: int
):
    """An interrupted run first completes its accumulation window or ends, so the checkpoint contains no gradients."""
    whole, pieces = Recorder(), Recorder()
    make_runner(work_dir=tmp_path / "whole", custom_hooks=[whole], train_cfg=train_cfg, **OPTIM, **VALIDATION).train()
    first = make_runner(custom_hooks=[pieces, At(at, interrupt)], train_cfg=train_cfg, **OPTIM, **VALIDATION)
    train_until_signal(first)
    assert first.interrupted == signal.SIGINT
    assert first.run.iter == -(-at // 4) * 4
    assert first.latest_checkpoint() == tmp_path / "run" / f"iter_{first.run.iter}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about resuming within a window
        make_runner(custom_hooks=[pieces], resume=True, train_cfg=train_cfg, **OPTIM, **VALIDATION).train()
    assert pieces.rows == whole.rows
    assert pieces.metrics == whole.metrics


def saved_inside(make_runner: MakeRunner) -> None:
    """Save a checkpoint after six iterations in windows of four."""
    hooks = {"runtime_info": None, "logger": None, "checkpoint": {"by_epoch": False, "interval": 6}}
    make_runner(custom_hooks=[At(7, stop)], default_hooks=hooks, train_cfg={"max_iters": 17}, **OPTIM).train()


def test_a_checkpoint_within_a_window_contains_its_gradients(make_runner: MakeRunner):
    """The resumed run restores the gradients of two of four micro-batches and does not warn."""
    saved_inside(make_runner)
    runner = make_runner(resume=True, train_cfg={"max_iters": 17}, **OPTIM)
    runner.prepare()
    optim, model = runner.strategy.optim_wrapper, runner.strategy.model
    assert (optim.inner_count, optim.num_steps_applied, optim.pending_micro_batches) == (6, 1, 2)
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_gradients_of_a_window_of_another_length_are_discarded(make_runner: MakeRunner):
    """Gradients that were divided by a different window length are discarded with a warning."""
    saved_inside(make_runner)
    optim_cfg = {**OPTIM["optim_wrapper"], "accumulative_counts": 5}
    runner = make_runner(resume=True, train_cfg={"max_iters": 17}, **{**OPTIM, "optim_wrapper": optim_cfg})
    with pytest.warns(UserWarning, match="The gradients of the last 2 micro-batches are lost"):
        runner.prepare()
    optim, model = runner.strategy.optim_wrapper, runner.strategy.model
    assert (optim.inner_count, optim.num_steps_applied, optim.pending_micro_batches) == (6, 1, 0)
    assert all(parameter.grad is None for parameter in model.parameters())


def interrupted_in_nine(folder: str) -> tuple[int, int, int]:
    """Train with DDP until a signal in iteration 9; return the numbers of iterations, steps, and pending batches."""
    changes = {"work_dir": folder, "strategy": "DDPStrategy", "launcher": "pytorch", "custom_hooks": [At(9, interrupt)]}
    runner = Runner(**settings(train_cfg={"max_iters": 30}, **changes, **OPTIM))
    train_until_signal(runner)
    runner.close()
    optim = runner.strategy.optim_wrapper
    return runner.run.iter, optim.num_steps_applied, optim.pending_micro_batches


def test_all_ranks_finish_the_same_window(ranks: Ranks, tmp_path: Path):
    """Under DDP, all ranks stop after the same iteration, at the end of the accumulation window of 4."""
    assert ranks.run(interrupted_in_nine, str(tmp_path)) == [(12, 3, 0)] * 2
