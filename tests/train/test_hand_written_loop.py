"""Using a strategy without a runner: the user writes the loop, and the strategy manages the state."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stratagem import SingleDeviceStrategy
from tests.train.toys import Samples, Toy


def train(strategy: SingleDeviceStrategy, batches: list, *, until: int, done: int = 0) -> list[float]:
    """Train with the strategy's components, save after the last iteration, and return the losses."""
    model, optim, schedulers = strategy.model, strategy.optim_wrapper, strategy.param_schedulers
    losses = []
    for batch in batches[done:until]:
        losses.append(model.train_step(batch, optim)["loss"].item())
        for scheduler in schedulers:
            scheduler.step()
    strategy.save_checkpoint(Path(strategy.work_dir) / f"iter_{until}", extra_ckpt={"meta": {"iter": until}})
    return losses


def prepared(work_dir: Path) -> SingleDeviceStrategy:
    """Return a strategy with all components built for seven iterations."""
    strategy = SingleDeviceStrategy(
        work_dir=work_dir, env_kwargs={"randomness": {"seed": 5}}, log_kwargs={"log_level": "ERROR"}
    )
    strategy.prepare(
        {"type": Toy},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "CosineAnnealingLR", "by_epoch": False},
        dispatch_kwargs={"max_iters": 7},
    )
    return strategy


@pytest.mark.slow
def test_a_hand_written_loop_trains_saves_and_resumes(tmp_path: Path):
    """The losses of a run in two parts equal those of the uninterrupted run."""
    batches = list(DataLoader(Samples(), batch_size=2))
    strategy = prepared(tmp_path / "whole")
    whole = train(strategy, batches, until=7)
    strategy.close()
    first = prepared(tmp_path / "cut")
    losses = train(first, batches, until=3)
    first.close()
    second = prepared(tmp_path / "cut")
    rest = second.load_or_resume(resume=True)
    losses += train(second, batches, until=7, done=rest["meta"]["iter"])
    second.close()
    assert losses == whole
    # The last value of a cosine annealing over 7 iterations.
    last = 0.1 * (1 + math.cos(math.pi * 6 / 7)) / 2
    assert second.optim_wrapper.get_lr() == {"lr": [pytest.approx(last)]}


def test_plain_pytorch_can_drive_the_components(tmp_path: Path):
    """A custom loop needs only the module and the optimizer wrapper that ``prepare`` returns."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"})
    network = nn.Linear(4, 3)
    model, optim = strategy.prepare(network, optim_wrapper=torch.optim.SGD(network.parameters(), lr=0.5))
    before = model.weight.detach().clone()
    loss = model(torch.ones(2, 4)).sum()
    optim.update_params(loss)
    # The gradient of each weight is the sum of its inputs, 2.
    assert torch.equal(model.weight, before - 0.5 * 2)
    strategy.close()
