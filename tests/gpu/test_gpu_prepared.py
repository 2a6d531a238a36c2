"""The prepared update on CUDA equals the step of torch's fused optimizers in every bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from stratagem.optim import OptimWrapper
from stratagem.optim.prepared import PreparedUpdate
from tests.gpu.devices import require_torch
from tests.gpu.models import SHAPES, Samples, mlp

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: SGD(groups, 0.1, fused=True),
    "SGD, momentum": lambda groups: SGD(groups, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "SGD, Nesterov": lambda groups: SGD(groups, 0.1, momentum=0.9, nesterov=True, fused=True),
    "Adam": lambda groups: Adam(groups, 0.1, weight_decay=0.01, fused=True),
    "AdamW": lambda groups: AdamW(groups, 0.1, betas=(0.8, 0.95), fused=True),
    "Adagrad": lambda groups: Adagrad(groups, 0.1, lr_decay=0.1, weight_decay=0.01, fused=True),
}


def build(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Optimizer:
    """Return an optimizer of two groups with several shapes and dtypes on the device."""
    if name.startswith("SGD") and len(dtypes) > 1 and device.type == "cpu":
        pytest.skip("requires a GPU: the fused SGD of torch leaves 16-bit values on the CPU unchanged")
    if name == "Adagrad":
        require_torch(2, 13)  # Before, the fused Adagrad does not support GPUs.
    generator = torch.Generator().manual_seed(0)
    groups = [
        {
            "params": [
                nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
                for dtype in dtypes
                for shape in ((129, 65), (70000,), ())
            ],
            "lr": rate,
        }
        for rate in (0.1, 0.01)
    ]
    return OPTIMIZERS[name](groups)


def set_gradients(optimizer: Optimizer, seed: int) -> None:
    """Set random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def values_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters and state tensors."""
    states = [
        value
        for each in parameters_of(optimizer)
        for value in optimizer.state[each].values()
        if isinstance(value, Tensor)
    ]
    return [*parameters_of(optimizer), *states]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=["fp32", "fp32 and bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_prepared_update_equals_the_step(name: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Over six updates, of which the kernels skip two because of ``found_inf``, all values have the same bits."""
    optimizer = build(name, device, dtypes)
    set_gradients(optimizer, 0)
    optimizer.step()
    reference = copy.deepcopy(optimizer)
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    for seed in range(1, 7):
        flag = torch.tensor(float(seed in (2, 5)), device=device)
        for each in (optimizer, reference):
            set_gradients(each, seed)
            each.found_inf, each.grad_scale = flag, None  # type: ignore[attr-defined]
        assert prepared.apply(optimizer)
        reference.step()
        for mine, own in zip(values_of(optimizer), values_of(reference), strict=True):
            assert mine.device == own.device
            assert torch.equal(mine, own)


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.1}], ids=["plain", "clipping"])
def test_the_wrapper_updates_as_without_the_prepared_update(clip: dict[str, Any] | None, device: torch.device) -> None:
    """Training with the prepared update and with ``optimizer.step()`` gives the same weights in every bit."""
    models = [mlp().to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, is_prepared in zip(models, (True, False), strict=True):
        optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
        optim = OptimWrapper(optimizer, clip_grad=clip, prepared=is_prepared)
        for inputs, targets in Samples(SHAPES["mlp"]).batches(8):
            optim.update_params(model(inputs.to(device), targets.to(device), mode="loss")["loss"])
    for mine, own in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, own)
