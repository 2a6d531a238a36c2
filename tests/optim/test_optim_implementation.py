"""Selecting the implementation of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from stratagem.errors import ConfigValueError
from stratagem.optim import BaseOptimWrapper, build_optim_wrapper
from stratagem.optim.implementation import implementation_options

MANY = [nn.Parameter(torch.zeros(2)) for _ in range(20)]


@pytest.mark.parametrize(
    ("kind", "options", "parameters", "expected"),
    [
        (AdamW, {}, MANY, {"fused": True}),
        (AdamW, {}, MANY[:1], {"fused": True}),
        (SGD, {}, MANY, {"fused": True}),
        # For a few tensors, plain SGD is faster in a loop.
        (SGD, {}, MANY[:4], {}),
        (SGD, {"momentum": 0.9}, MANY[:4], {"fused": True}),
        (RMSprop, {}, MANY, {}),
        (Adam, {"foreach": True}, MANY, {}),
        (Adam, {"fused": False}, MANY, {}),
        (Adam, {"fused": None}, MANY, {"fused": True}),
        (Adam, {"differentiable": True}, MANY, {}),
        (Adam, {"capturable": True}, MANY, {}),
        (Adam, {}, [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], {}),
        (Adam, {}, [nn.Parameter(torch.zeros(2, device="meta"))], {}),
    ],
)
def test_the_default_is_the_fastest_implementation(
    kind: type, options: dict[str, Any], parameters: list[nn.Parameter], expected: dict[str, bool]
) -> None:
    """The fused implementation is the default if the optimizer, data types and devices support it."""
    assert implementation_options(kind, options, parameters) == expected


def test_sparse_gradients_are_not_fused() -> None:
    """Parameters with sparse gradients do not use the fused implementation."""
    model = nn.Embedding(4, 2, sparse=True)
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=1.0, momentum=0.0)))
    assert isinstance(wrapper, BaseOptimWrapper)
    assert not wrapper.param_groups[0]["fused"]
    wrapper.update_params(model(torch.tensor([1])).sum())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("fused", {"fused": True}), ("foreach", {"foreach": True}), ("loop", {"fused": False, "foreach": False})],
)
def test_the_implementation_can_be_chosen(choice: str, expected: dict[str, bool]) -> None:
    """``implementation`` in the optimizer wrapper selects the implementation."""
    assert implementation_options(Adam, {}, MANY, implementation=choice) == expected


@pytest.mark.parametrize(
    ("choice", "options", "text"),
    [
        ("fast", {}, "Unknown implementation"),
        ("fused", {}, "RMSprop has no fused"),
        ("loop", {"foreach": True}, "conflicts with"),
    ],
)
def test_an_invalid_implementation_is_rejected(choice: str, options: dict[str, Any], text: str) -> None:
    """An unknown, unsupported or contradictory implementation raises an error."""
    with pytest.raises(ConfigValueError, match=text):
        implementation_options(RMSprop, options, MANY, implementation=choice)


def test_all_implementations_take_the_same_steps() -> None:
    """The fused, foreach and loop implementations give the same weights."""
    results = []
    for choice in ("fused", "foreach", "loop"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        wrapper = build_optim_wrapper(
            model, dict(optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.1), implementation=choice)
        )
        assert isinstance(wrapper, BaseOptimWrapper)
        for _ in range(3):
            wrapper.update_params(model(torch.ones(2, 4)).square().mean())
        results.append(model.weight.detach())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_updates_every_value_of_16_bit_parameters(dtype: torch.dtype, momentum: float) -> None:
    """On the CPU, torch's fused kernel leaves most values of 16-bit parameters unchanged, so it is not used."""
    model = nn.Linear(16, 16, bias=False, dtype=dtype)
    before = model.weight.detach().clone()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=1.0, momentum=momentum)))
    assert isinstance(wrapper, BaseOptimWrapper)
    wrapper.update_params(model.weight.sum())
    assert torch.equal(model.weight.detach(), before - 1)
    with pytest.raises(ConfigValueError, match="does not update all values of 16-bit parameters"):
        implementation_options(SGD, {}, [model.weight], implementation="fused")
    with pytest.raises(ConfigValueError, match="omit fused=True"):
        implementation_options(SGD, {"fused": True}, [model.weight])
