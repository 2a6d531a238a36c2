"""Optimizers on two ranks compute the same as one process with all samples."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from stratagem.dist import get_rank
from stratagem.model import BaseModel
from stratagem.strategies import DDPStrategy
from tests.support.ranks import Ranks, seed_generators

# The number of samples in each micro-batch of a step, for each rank.
SIZES = ((3, 1), (2, 5))


class Sums(BaseModel):
    """A network that returns its loss with the number of samples as weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
        found = self.layers(inputs)
        if mode != "loss":
            return found
        return {"loss": nn.functional.mse_loss(found, targets), "weight": len(inputs)}


def samples(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return 11 samples, the total number in all micro-batches."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(11, 4, generator=generator) * scale, torch.randn(11, 2, generator=generator)


def micro_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of one rank."""
    inputs, targets = samples()
    sizes = [size for of_rank in SIZES for size in of_rank]
    pairs = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    return pairs[2 * rank : 2 * rank + 2]


def prepared(folder: str, **optim: Any) -> tuple[DDPStrategy, Any, Any]:
    """Return a strategy on both ranks with the network, initialized from a fixed seed, and its wrapper."""
    strategy = DDPStrategy(work_dir=folder, env_kwargs={"launcher": "pytorch"}, log_kwargs={"log_level": "ERROR"})
    seed_generators(3)
    optim = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, **optim}
    model, wrapper = strategy.prepare(Sums(), optim_wrapper=optim, dispatch_kwargs={"max_iters": 100})
    return strategy, model, wrapper


def weights(strategy: DDPStrategy) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return {name: value.clone() for name, value in strategy.model_state_dict().items()}


def weighted_steps(folder: str, **optim: Any) -> tuple[dict[str, Tensor], int, list[Tensor]]:
    """Take two weighted steps with two micro-batches each; return weights, all-reduces and intermediate gradients."""
    strategy, model, wrapper = prepared(folder, accumulative_counts=2, **optim)
    exchanges: list[int] = []
    # Use a lambda, because torch does not support string annotations here.
    model.register_comm_hook(None, lambda _, bucket: exchanges.append(bucket.index()) or allreduce_hook(None, bucket))
    between = []
    for _ in range(2):
        for batch in micro_batches(get_rank()):
            model.train_step(batch, wrapper)
            gradient = strategy.unwrap_model().layers[0].weight.grad
            between += [] if gradient is None else [gradient.clone()]
    strategy.close()
    return weights(strategy), len(exchanges), between


def one_big_batch(**optim: Any) -> dict[str, Tensor]:
    """Return the weights after two steps of plain torch on all samples."""
    seed_generators(3)
    model = Sums()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model.layers(samples()[0]), samples()[1]).backward()
        if "clip_grad" in optim:
            torch.nn.utils.clip_grad_norm_(model.parameters(), **optim["clip_grad"])
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("optim", [{}, {"clip_grad": {"max_norm": 0.05}}], ids=["plain", "clipped"])
def test_weighted_losses_match_one_large_batch(ranks: Ranks, tmp_path: Path, optim: dict):
    """Micro-batches of 3, 1 and 2, 5 samples on two ranks give the same step as 11 samples, including clipping."""
    (found, exchanges, between), (other, _, gradients) = ranks.run(weighted_steps, str(tmp_path), **optim)
    expected = one_big_batch(**optim)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert torch.equal(found[name], other[name])
    # The network fits in one bucket, so there is one all-reduce per step. In between, gradients differ between ranks.
    assert exchanges == 2
    assert not torch.equal(between[0], gradients[0])


def overflow(folder: str, **optim: Any) -> tuple[int, int, float | None, dict[str, Tensor]]:
    """Train three steps with an infinite loss on rank 1 in the second."""
    strategy, model, wrapper = prepared(folder, **optim)
    before = None
    for step in range(3):
        inputs, targets = micro_batches(get_rank())[0]
        if step == 1:
            before = weights(strategy)
            targets = targets * (math.inf if get_rank() == 1 else 1.0)
        model.train_step((inputs, targets), wrapper)
        if step == 1:
            assert before is not None
            after = weights(strategy)
            assert all(torch.equal(after[name], value) for name, value in before.items())
    strategy.close()
    scaler = getattr(wrapper, "loss_scaler", None)
    return (
        wrapper.num_steps_attempted,
        wrapper.num_steps_applied,
        None if scaler is None else scaler.get_scale(),
        weights(strategy),
    )


@pytest.mark.parametrize(
    ("optim", "scale"),
    [
        ({"nonfinite": "skip"}, None),
        ({"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": {"init_scale": 256.0}}, 128.0),
    ],
    ids=["skip", "float16"],
)
def test_an_overflow_on_one_rank_is_skipped_on_both_ranks(
    ranks: Ranks, tmp_path: Path, optim: dict, scale: float | None
):
    """If the loss overflows on one rank, both ranks skip the step, reduce the scale and continue with equal weights."""
    first, second = ranks.run(overflow, str(tmp_path), **optim)
    assert first[:3] == second[:3] == (3, 2, scale)
    assert all(torch.equal(first[3][name], value) for name, value in second[3].items())


def zero_steps(folder: str, steps: int, resume: str | None, kind: dict) -> tuple[dict[str, Tensor], int]:
    """Train, optionally after resuming, and save; return the weights and the number of state elements on this rank."""
    with warnings.catch_warnings():
        # Importing torch.distributed.optim compiles functions with TorchScript, which causes a warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        strategy, model, wrapper = prepared(folder, optimizer=kind)
    if resume is not None:
        strategy.resume(resume)
    for _ in range(steps):
        model.train_step(micro_batches(get_rank())[0], wrapper)
    strategy.save_checkpoint(f"{folder}/saved")
    strategy.close()
    inner = getattr(wrapper.optimizer, "optim", wrapper.optimizer)
    count = sum(value.numel() for slots in inner.state.values() for value in slots.values() if value.ndim)
    return weights(strategy), count


ADAMW = {"lr": 0.05, "weight_decay": 0.1}
WHOLE = {"type": "AdamW", **ADAMW}
SPREAD = {"type": "ZeroRedundancyOptimizer", "optimizer_type": "AdamW", **ADAMW}


def test_sharded_optimizer_state_gives_the_same_weights(ranks: Ranks, tmp_path: Path):
    """ZeroRedundancyOptimizer gives the same weights as AdamW, with a part of the state on each rank."""
    (whole, all_of_it), _ = ranks.run(zero_steps, str(tmp_path / "whole"), 4, None, WHOLE)
    (spread, first), (other, second) = ranks.run(zero_steps, str(tmp_path / "spread"), 4, None, SPREAD)
    for name, value in whole.items():
        torch.testing.assert_close(spread[name], value)
        assert torch.equal(spread[name], other[name])
    assert first + second == all_of_it
    assert max(first, second) < all_of_it


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(SPREAD, SPREAD), (SPREAD, WHOLE), (WHOLE, SPREAD)], ids=str)
def test_sharded_optimizer_state_is_saved_unsharded_and_resumed(
    ranks: Ranks, tmp_path: Path, saved_by: dict, resumed_by: dict
):
    """Sharded state is saved unsharded, and sharded and unsharded optimizers can resume from each other."""
    (expected, _), _ = ranks.run(zero_steps, str(tmp_path / "four"), 4, None, WHOLE)
    ranks.run(zero_steps, str(tmp_path / "two"), 2, None, saved_by)
    saved = str(tmp_path / "two" / "saved")
    (found, _), (other, _) = ranks.run(zero_steps, str(tmp_path / "more"), 2, saved, resumed_by)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert torch.equal(found[name], other[name])
