"""Several backward passes before one update add up over all ranks, under DistributedDataParallel and FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backward_passes
from backward_passes import OPTIMIZERS, SUMS, by_plain_torch, require_equal
from ranks import Ranks
from stratagem.dist import get_rank
from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.strategies import DDPStrategy

DDP: dict[str, Any] = {"type": "DDPStrategy"}
UNUSED = {**DDP, "find_unused_parameters": True}
FSDP: dict[str, Any] = {"type": "FSDPStrategy", "wrap_policy": "Linear"}
PLACEMENTS = {"DDP": DDP, "DDP, unused": UNUSED, "DDP, static": {**DDP, "static_graph": True}, "FSDP": FSDP}
HALF = {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": 256.0}


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_backward_passes_count_as_their_sum(ranks: Ranks, tmp_path: Path, placement: str, way: str) -> None:
    """Gradients of every pass are averaged over the ranks, however a step computes them, and clipped as one."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "clip_grad": {"max_norm": 0.5}}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, max_norm=0.5))


@pytest.mark.parametrize("placement", ["DDP", "FSDP"])
def test_an_update_within_a_window_uses_the_gradients_that_were_held_back(
    ranks: Ranks, tmp_path: Path, placement: str
) -> None:
    """A step that updates when it likes steps by the mean of all ranks, though the wrapper's window is not complete."""
    optim = {"optimizer": OPTIMIZERS["AdamW"], "accumulative_counts": 4}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), "own window", optim)
    require_equal(found, by_plain_torch("own window", "AdamW", window=2))


def test_two_passes_in_float16_are_averaged_before_they_are_unscaled(ranks: Ranks, tmp_path: Path) -> None:
    """Ranks keep the same bits, and are as near to float32 as float16 is."""
    optim = {**HALF, "optimizer": OPTIMIZERS["SGD"], "nonfinite": "skip"}
    found = ranks.run(backward_passes.trained, DDP, str(tmp_path), "two forwards", optim)
    require_equal(found, by_plain_torch("two forwards"), tolerance=2e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("way", "window"), [("a head each", 1), ("a head each", 2), ("a head each, one NaN", 1)])
@pytest.mark.parametrize("placement", ["DDP, unused", "FSDP"])
def test_a_part_that_a_step_does_not_use_keeps_its_weights(
    ranks: Ranks, tmp_path: Path, placement: str, way: str, window: int, optimizer: str
) -> None:
    """Heads that train alternately step as in one process, also in windows of two and after a skipped update."""
    optim = {"optimizer": OPTIMIZERS[optimizer], "accumulative_counts": window, "nonfinite": "skip"}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, optimizer, window=window))


class LossOfEachHead(backward_passes.TwoHeads):
    """Calls ``backward`` for a loss of each head."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from the two losses in two passes."""
        losses = [self.losses(data, heads=head)["near"] for head in "ab"]
        for loss in losses:
            optim_wrapper.backward(loss)
        optim_wrapper.step()
        return {"loss": losses[0].detach()}


def refusal(folder: str) -> str:
    """Train with a loss of each head."""
    strategy = DDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    try:
        model, wrapper = strategy.prepare(LossOfEachHead(), optim_wrapper={"optimizer": OPTIMIZERS["SGD"]})
        with pytest.raises(PlacementError) as raised:
            model.train_step(backward_passes.of_this_rank(backward_passes.batch(1)), wrapper)
        return str(raised.value)
    finally:
        strategy.close()


def test_passes_that_reach_different_parameters_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """DDP cannot average them one after the other; the error says to add the losses."""
    for told in ranks.run(refusal, str(tmp_path)):
        assert "LossOfEachHead.train_step began a backward pass before DDP had the gradients of all parameters" in told
        assert "optim_wrapper.update_params(loss_1 + loss_2)" in told


class Pair(BaseModel):
    """Two numbers with an optimizer each; a step calls ``backward`` twice for each."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = Number(), Number()

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Tensor:
        """Return what both make of the inputs."""
        return self.judge(self.maker(inputs))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Let both learn."""
        for name in ("maker", "judge"):
            products = [getattr(self, name)(data), getattr(self, name)(2 * data)]
            for product in products:
                optim_wrapper[name].backward(product.mean())
            optim_wrapper[name].step()
            optim_wrapper[name].zero_grad()
        return {"loss": products[0].detach()}


class Number(nn.Module):
    """A number by which inputs are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product."""
        return self.scale * inputs


def two_optimizers(folder: str) -> list[float]:
    """Take a step with two optimizers on other data on each rank; return both numbers."""
    strategy = DDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, model_wrapper="separate")
    try:
        model = Pair()
        wrappers = {
            name: OptimWrapper(torch.optim.SGD(getattr(model, name).parameters(), lr=0.25))
            for name in ("maker", "judge")
        }
        placed, wrapper = strategy.prepare(model, optim_wrapper=OptimWrapperDict(**wrappers))
        placed.train_step(torch.tensor([1.0 + 2 * get_rank()]), wrapper)
        return [model.maker.scale.item(), model.judge.scale.item()]
    finally:
        strategy.close()


def test_passes_of_several_optimizers_add_up_for_each(ranks: Ranks, tmp_path: Path) -> None:
    """Gradients 1 + 2 and 3 + 6 have the mean 6, so that a quarter of it leaves 1 - 1.5 on both ranks."""
    assert ranks.run(two_optimizers, str(tmp_path)) == [[-0.5, -0.5]] * 2


def resumed_within_a_window(folder: str) -> list[dict[str, Tensor]]:
    """Train a head, save within the window, and train the other one in a second strategy; return its weights."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": 2}
    for start in (1, 2):
        strategy = DDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"}, find_unused_parameters=True)
        try:
            built = backward_passes.built("a head each")
            built.iteration = start - 1
            model, wrapper = strategy.prepare(built, optim_wrapper=optim, dispatch_kwargs={"max_iters": 1000})
            if start == 2:
                strategy.resume(f"{folder}/saved")
            model.train_step(backward_passes.of_this_rank(backward_passes.batch(start)), wrapper)
            if start == 1:
                strategy.save_checkpoint(f"{folder}/saved", extra_ckpt={"meta": {"iter": 1}})
            weights = backward_passes.weights_of(strategy)
        finally:
            strategy.close()
    return [weights]


def test_a_part_used_only_before_the_checkpoint_of_a_window_is_averaged(ranks: Ranks, tmp_path: Path) -> None:
    """Gradients that a checkpoint restored are those of each rank; the update uses their mean."""
    found = ranks.run(resumed_within_a_window, str(tmp_path))
    require_equal(found, by_plain_torch("a head each", window=2)[1:2])
