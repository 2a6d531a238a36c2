"""Training on a GPU equals training with a hand-written loop, and training on the CPU within a tolerance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.strategies import SingleDeviceStrategy
from tests.gpu.devices import require_torch
from tests.gpu.models import MODELS, SHAPES, Samples

STEPS = 12
# Sums in another order: float32 keeps 7 digits, of which twelve updates of small networks lose about three.
RELATIVE, ABSOLUTE = 2e-3, 2e-4

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "sgd_fused": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "fused": True},
    "adam": {"type": "Adam", "lr": 1e-3},
    "adamw": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1},
    "adamw_foreach": {"type": "AdamW", "lr": 1e-3, "foreach": True},
    "adamw_fused": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1, "fused": True},
    "adagrad": {"type": "Adagrad", "lr": 1e-2},
    "rmsprop": {"type": "RMSprop", "lr": 1e-3},
    "adamax": {"type": "Adamax", "lr": 1e-3},
    "nadam": {"type": "NAdam", "lr": 1e-3},
}


def by_hand(model: nn.Module, spec: dict[str, Any], batches: list[Any], device: torch.device) -> list[float]:
    """Train with the usual loop of torch on a device; return the losses."""
    model.to(device).train()
    options = {name: value for name, value in spec.items() if name != "type"}
    optimizer = getattr(torch.optim, spec["type"])(model.parameters(), **options)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = model(inputs.to(device), targets.to(device), mode="loss")["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


def with_strategy(model: nn.Module, spec: dict[str, Any], batches: list[Any], folder: Path) -> list[float]:
    """Train with a strategy on the device that it selects; return the losses."""
    strategy = SingleDeviceStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    strategy.prepare(model, optim_wrapper={"optimizer": spec})
    losses = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"] for batch in batches]
    values = [loss.item() for loss in losses]
    strategy.close()
    return values


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Return the largest absolute difference of two models' tensors."""
    pairs: list[tuple[Tensor, Tensor]] = [
        (tensor.cpu().double(), other.cpu().double())
        for tensor, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    ]
    return max((one - two).abs().max().item() for one, two in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_one_gpu_trains_like_the_cpu(name: str, device: torch.device, tmp_path: Path) -> None:
    """The losses and weights after twelve updates equal those of a hand-written loop on the CPU within the tolerance."""
    torch.backends.cudnn.allow_tf32 = False
    batches = Samples(SHAPES[name]).batches(8)[:STEPS]
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    losses = with_strategy(model, OPTIMIZERS["sgd"], batches, tmp_path)
    expected = by_hand(reference, OPTIMIZERS["sgd"], batches, torch.device("cpu"))
    assert next(model.parameters()).device == device
    assert losses == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
    assert largest_difference(model, reference) < 2e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_as_in_a_hand_written_loop(name: str, device: torch.device, tmp_path: Path) -> None:
    """On one device, the losses and weights equal those of the hand-written loop in every bit, and those of the CPU nearly."""
    if name == "adagrad":
        require_torch(2, 13)  # Before, the fused Adagrad does not support GPUs.
    batches = Samples(SHAPES["mlp"]).batches(8)[:STEPS]
    model = MODELS["mlp"]()
    same_device, on_cpu = copy.deepcopy(model), copy.deepcopy(model)
    losses = with_strategy(model, OPTIMIZERS[name], batches, tmp_path)
    # The strategy selects the fused implementation if there is one; the loop has to do the same for equal bits.
    fused = {"fused": True} if name in {"sgd", "adam", "adamw", "adagrad"} else {}
    assert losses == by_hand(same_device, {**OPTIMIZERS[name], **fused}, batches, device)
    assert largest_difference(model, same_device) == 0
    expected = by_hand(on_cpu, OPTIMIZERS[name], batches, torch.device("cpu"))
    assert losses == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
