"""Regression tests for known defects of similar systems. More are next to the tests of state and building."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.data import build_dataloader
from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.optim import ConstantLR, OptimWrapper
from stratagem.strategies import BaseStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Line, Mlp, make, train

Make = Callable[..., BaseStrategy]

PLAIN = {"optimizer": {"type": "SGD", "lr": 1.0}}


def test_a_resumed_seed_does_not_leak_into_the_next_strategy(single: Make, tmp_path: Path) -> None:
    """A strategy without a seed generates one, even after another strategy resumed a seed."""
    first = single(seed=123_456)
    first.prepare(Line())
    first.save_checkpoint(tmp_path / "a")
    resumed = single(seed=None, env={"randomness": None})
    resumed.prepare(Line())
    resumed.resume(tmp_path / "a")
    assert resumed.seed == 123_456
    assert single(env={"randomness": None}).seed != 123_456
    assert single(env={"randomness": {"seed": None}}).seed != 123_456


def test_compiling_does_not_modify_the_configuration(single: Make) -> None:
    """Compiling does not modify the configuration, so a second run compiles the same method."""
    cfg = {"target": "val_step", "backend": "eager"}
    for _ in range(2):
        assert "val_step" in vars(single().prepare(Mlp(), compile=cfg))
    assert cfg == {"target": "val_step", "backend": "eager"}


def test_scheduler_instances_are_not_dropped(single: Make) -> None:
    """Scheduler instances are used and saved."""
    optim = OptimWrapper(SGD([nn.Parameter(torch.ones(()))], lr=1.0))
    built = ConstantLR(optim, factor=0.5)
    strategy = single()
    strategy.prepare(Line(), optim_wrapper=optim, param_scheduler=built)
    assert strategy.param_schedulers == [built]
    assert len(strategy.scheduler_state_dict()) == 1


def test_no_option_is_ignored_under_ddp(ranks: Ranks, tmp_path: Path) -> None:
    """``compile``, ``auto_scale_lr`` and callbacks take effect under DDP; compiling train_step is rejected."""
    # 2 ranks x 2 samples with a base of 8 halve the learning rate.
    assert ranks.run(accepted_on_a_rank, str(tmp_path)) == [(True, 0.5, ["save", "load", "resume"], True)] * 2


def accepted_on_a_rank(folder: str) -> tuple[bool, float, list[str], bool]:
    """Use compile, auto_scale_lr and callbacks on a rank."""
    strategy = make("ddp", folder, auto_scale_lr={"enable": True, "base_batch_size": 8})
    strategy.prepare(
        Line(),
        optim_wrapper=PLAIN,
        compile={"backend": "eager"},
        dispatch_kwargs={"train_micro_batch_size_per_gpu": 2},
    )
    called: list[str] = []
    strategy.save_checkpoint(f"{folder}/a", callback=lambda _: called.append("save"))
    strategy.load_checkpoint(f"{folder}/a", callback=lambda _: called.append("load"))
    strategy.resume(f"{folder}/a", callback=lambda _: called.append("resume"))
    facts = "forward" in vars(strategy.unwrap_model()), strategy.optim_wrapper.get_lr()["lr"][0], called
    strategy.close()
    other = make("ddp", folder)
    try:
        other.prepare(Line(), compile={"target": "train_step", "backend": "eager"})
        rejected = False
    except PlacementError:
        rejected = True
    other.close()
    return *facts, rejected


def test_clipping_uses_the_norm_of_the_synchronized_gradient(ranks: Ranks, tmp_path: Path) -> None:
    """Gradients are clipped after synchronization: the mean of 3 and -5 is -1, but if clipped before, they would cancel."""
    # From 2 with a learning rate of 1: 3 and 5 average to 4, which is clipped to 1.
    assert ranks.run(clipped_on_a_rank, str(tmp_path)) == [pytest.approx([1.0, 3.0], rel=1e-5)] * 2


def clipped_on_a_rank(folder: str) -> list[float]:
    """Return the weight after a step with the gradients 3 and 5, and after one with 3 and -5."""
    weights = []
    for gradients in ((3.0, 5.0), (3.0, -5.0)):
        strategy = make("ddp", folder)
        strategy.prepare(Line(2.0), optim_wrapper={**PLAIN, "clip_grad": {"max_norm": 1.0}})
        train(strategy, [torch.tensor([gradients[strategy.rank]])])
        weights.append(strategy.unwrap_model().weight.item())
        strategy.close()
    return weights


def test_a_shorter_last_window_is_scaled_by_its_length(tmp_path: Path) -> None:
    """6 micro-batches in windows of 4 with gradient 1 and learning rate 1 reduce the weight from 2 by 1.0 twice."""
    assert windows("single", str(tmp_path)) == [1.0, 0.0]


def test_a_shorter_last_window_is_synchronized_under_ddp(ranks: Ranks, tmp_path: Path) -> None:
    """On two ranks, the gradients 0.5 and 1.5 average to 1 in the last window, too."""
    assert ranks.run(windows, "ddp", str(tmp_path)) == [[1.0, 0.0]] * 2


def windows(kind: str, folder: str) -> list[float]:
    """Return the weight after each update."""
    strategy = make(kind, folder)
    strategy.prepare(Line(2.0), optim_wrapper={**PLAIN, "accumulative_counts": 4}, dispatch_kwargs={"max_iters": 6})
    gradient = 1.0 if kind == "single" else (0.5, 1.5)[strategy.rank]
    weights = []
    for _ in range(6):
        train(strategy, [torch.tensor([gradient])])
        if strategy.optim_wrapper.should_update():
            weights.append(strategy.unwrap_model().weight.item())
    strategy.close()
    return weights


def test_an_interrupted_epoch_neither_repeats_nor_skips_samples(ranks: Ranks) -> None:
    """24 samples: two ranks use 3 batches of 2 each and one process uses the rest, every sample once."""
    first = ranks.run(samples, 0, 3)
    rest = samples(3, None)
    seen = [sample for rank in first for sample in rank]
    assert len(seen) == 12
    assert sorted(seen + rest) == list(range(24))


def samples(start: int, stop: int | None) -> list[int]:
    """Return the samples of some batches of the epoch; the global batch size is 4."""
    rank, size = (torch.distributed.get_rank(), 2) if torch.distributed.is_initialized() else (0, 1)
    loader = build_dataloader(
        {"dataset": list(range(24)), "batch_size": 4 // size}, seed=3, rank=rank, world_size=size, training=True
    )
    batches = list(loader.batches(1, start))[: None if stop is None else stop - start]
    return [sample for batch in batches for sample in batch]


class Dropping(BaseModel):
    """A model that draws random numbers in its forward pass, like dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Any, mode: str = "tensor") -> Any:
        return {"loss": nn.functional.dropout(self.layer(x), 0.5).sum()}


def test_resuming_continues_the_random_numbers(single: Make, tmp_path: Path) -> None:
    """Dropout masks after resuming are those of the uninterrupted run."""
    data = torch.ones(16, 4)
    one = single()
    one.prepare(Dropping(), optim_wrapper={"optimizer": {"type": "SGD", "lr": 1e-3}})
    train(one, [data] * 3)
    one.save_checkpoint(tmp_path / "a")
    expected = train(one, [data] * 3)
    other = single()
    other.prepare(Dropping(), optim_wrapper={"optimizer": {"type": "SGD", "lr": 1e-3}})
    other.resume(tmp_path / "a")
    assert train(other, [data] * 3) == expected
