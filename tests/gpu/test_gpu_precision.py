"""Mixed precision on a GPU equals a hand-written loop with autocast and a gradient scaler."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.strategies import SingleDeviceStrategy
from tests.gpu.models import MODELS, SHAPES, Classifier, Samples
from tests.gpu.test_gpu_equality import largest_difference

SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9}


def by_hand(model: nn.Module, dtype: torch.dtype, batches: list[Any], device: torch.device) -> list[float]:
    """Train with autocast, and with a scaler for float16; return the losses."""
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = model(inputs.to(device), targets.to(device), mode="loss")["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_mixed_precision_equals_a_hand_written_loop(
    name: str, dtype: str, device: torch.device, tmp_path: Path
) -> None:
    """Losses and weights have the same bits, and the weights, gradients and moments stay in float32."""
    batches = Samples(SHAPES[name]).batches(8)
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"})
    strategy.prepare(model, optim_wrapper={"type": "AmpOptimWrapper", "dtype": dtype, "optimizer": SGD})
    losses = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"].item() for batch in batches]
    state = strategy.optim_wrapper.optimizer.state
    strategy.close()
    assert losses == by_hand(reference, getattr(torch, dtype), batches, device)
    assert largest_difference(model, reference) == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {slots["momentum_buffer"].dtype for slots in state.values()} == {torch.float32}


def test_float16_skips_an_overflow_and_halves_the_scale(device: torch.device, tmp_path: Path) -> None:
    """A batch whose gradients overflow does not change the weights; the next update is applied with half the scale."""
    model = Classifier(nn.Linear(4, 5))
    strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"})
    spec = {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": {"init_scale": 1024.0}, "optimizer": SGD}
    strategy.prepare(model, optim_wrapper=spec)
    optim = strategy.optim_wrapper
    before = model.layers.weight.detach().clone()  # type: ignore[union-attr]
    targets = torch.zeros(2, dtype=torch.long)
    strategy.model.train_step((torch.full((2, 4), 3e4), targets), optim)
    assert torch.equal(model.layers.weight, before)  # type: ignore[arg-type]
    assert optim.loss_scale == 512.0
    strategy.model.train_step((torch.ones(2, 4), targets), optim)
    assert not torch.equal(model.layers.weight, before)  # type: ignore[arg-type]
    assert (optim.num_steps_attempted, optim.num_steps_applied) == (2, 1)
    assert before.device == device
    strategy.close()
