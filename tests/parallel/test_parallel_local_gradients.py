"""Several backward passes before one update are summed and averaged over all ranks, under DDP and FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.dist import get_rank
from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.strategies import DDPStrategy
from tests.support import backward_passes
from tests.support.backward_passes import OPTIMIZERS, SUMS, by_plain_torch, require_equal
from tests.support.ranks import Ranks

DDP: dict[str, Any] = {"type": "DDPStrategy"}
UNUSED = {**DDP, "find_unused_parameters": True}
FSDP: dict[str, Any] = {"type": "FSDPStrategy", "wrap_policy": "Linear"}
PLACEMENTS = {"DDP": DDP, "DDP, unused": UNUSED, "DDP, static": {**DDP, "static_graph": True}, "FSDP": FSDP}
HALF = {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": 256.0}


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_backward_passes_are_summed(ranks: Ranks, tmp_path: Path, placement: str, way: str) -> None:
    """The gradients of several passes are averaged over the ranks and clipped by their sum."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "clip_grad": {"max_norm": 0.5}}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, max_norm=0.5))


@pytest.mark.parametrize("placement", ["DDP", "FSDP"])
def test_an_update_within_a_window_uses_the_accumulated_gradients(ranks: Ranks, tmp_path: Path, placement: str) -> None:
    """A custom update within an accumulation window uses the mean gradient of all ranks."""
    optim = {"optimizer": OPTIMIZERS["AdamW"], "accumulative_counts": 4}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), "own window", optim)
    require_equal(found, by_plain_torch("own window", "AdamW", window=2))


def test_two_passes_in_float16_are_averaged_before_they_are_unscaled(ranks: Ranks, tmp_path: Path) -> None:
    """With float16, ranks have identical bits, and the weights match float32 within the precision of float16."""
    optim = {**HALF, "optimizer": OPTIMIZERS["SGD"], "nonfinite": "skip"}
    found = ranks.run(backward_passes.trained, DDP, str(tmp_path), "two forwards", optim)
    require_equal(found, by_plain_torch("two forwards"), tolerance=2e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("way", "window"), [("a head each", 1), ("a head each", 2), ("a head each, one NaN", 1)])
@pytest.mark.parametrize("placement", ["DDP, unused", "FSDP"])
def test_an_unused_part_keeps_its_weights(
    ranks: Ranks, tmp_path: Path, placement: str, way: str, window: int, optimizer: str
) -> None:
    """Alternately trained heads match a single process, including windows of two and skipped updates."""
    optim = {"optimizer": OPTIMIZERS[optimizer], "accumulative_counts": window, "nonfinite": "skip"}
    found = ranks.run(backward_passes.trained, PLACEMENTS[placement], str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, optimizer, window=window))


class LossOfEachHead(backward_passes.TwoHeads):
    """A model that calls ``backward`` for a separate loss of each head."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on the two losses in two passes."""
        losses = [self.losses(data, heads=head)["near"] for head in "ab"]
        for loss in losses:
            optim_wrapper.backward(loss)
        optim_wrapper.step()
        return {"loss": losses[0].detach()}


def error_message(folder: str) -> str:
    """Train with a separate loss for each head."""
    strategy = DDPStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    try:
        model, wrapper = strategy.prepare(LossOfEachHead(), optim_wrapper={"optimizer": OPTIMIZERS["SGD"]})
        with pytest.raises(PlacementError) as raised:
            model.train_step(backward_passes.of_this_rank(backward_passes.batch(1)), wrapper)
        return str(raised.value)
    finally:
        strategy.close()


def test_passes_with_different_parameters_are_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """Passes that reach different parameters raise an error that suggests adding the losses."""
    for reported in ranks.run(error_message, str(tmp_path)):
        assert (
            "LossOfEachHead.train_step started a backward pass before DDP received the gradients of all parameters"
            in reported
        )
        assert "optim_wrapper.update_params(loss_1 + loss_2)" in reported


class Pair(BaseModel):
    """Two numbers with separate optimizers; a step calls ``backward`` twice for each."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = Number(), Number()

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Tensor:
        """Return the result of both parts."""
        return self.judge(self.maker(inputs))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train both parts."""
        for name in ("maker", "judge"):
            products = [getattr(self, name)(data), getattr(self, name)(2 * data)]
            for product in products:
                optim_wrapper[name].backward(product.mean())
            optim_wrapper[name].step()
            optim_wrapper[name].zero_grad()
        return {"loss": products[0].detach()}


class Number(nn.Module):
    """A number that is multiplied by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product."""
        return self.scale * inputs


def two_optimizers(folder: str) -> list[float]:
    """Take a step with two optimizers, with different data on each rank; return both numbers."""
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


def test_passes_of_several_optimizers_are_summed_for_each(ranks: Ranks, tmp_path: Path) -> None:
    """The mean of the gradients 1 + 2 and 3 + 6 is 6, and a quarter of it leaves 1 - 1.5 on both ranks."""
    assert ranks.run(two_optimizers, str(tmp_path)) == [[-0.5, -0.5]] * 2


def resumed_within_a_window(folder: str) -> list[dict[str, Tensor]]:
    """Train one head, save within the window, and train the other head after resuming; return its weights."""
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


def test_gradients_from_a_checkpoint_are_averaged(ranks: Ranks, tmp_path: Path) -> None:
    """An update after resuming within a window averages the restored gradients of all ranks."""
    found = ranks.run(resumed_within_a_window, str(tmp_path))
    require_equal(found, by_plain_torch("a head each", window=2)[1:2])
