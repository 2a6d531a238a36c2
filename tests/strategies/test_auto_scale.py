"""Scaling the learning rate with the batch size."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.strategies.setup.auto_scale import AutoScale


def wrapper(*rates: float, **options: int) -> OptimWrapper:
    """Return a wrapper with one parameter group per learning rate."""
    return OptimWrapper(SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]), **options)


@pytest.mark.parametrize(("rule", "factor"), [({}, 4.0), ({"rule": "linear"}, 4.0), ({"rule": "sqrt"}, 2.0)])
def test_rates_scale_with_the_batch_or_its_square_root(rule: dict[str, str], factor: float):
    """2 ranks x 16 samples x 2 accumulated are 64 samples, 4 times the base batch size of 16."""
    scale = AutoScale.parse({"enable": True, "base_batch_size": 16, **rule})
    assert scale is not None
    optim = wrapper(1.0, 0.1, accumulative_counts=2)
    (expected,) = scale.apply(optim, world_size=2, micro_batch=16)
    assert optim.get_lr() == {"lr": pytest.approx([factor, 0.1 * factor])}
    assert f"by {factor:.4g}" in expected
    assert ("square root" in expected) == (scale.rule == "sqrt")
    assert "64 = 2 ranks x 16 samples x 2 accumulated" in expected


def test_a_smaller_batch_reduces_the_rates_of_all_optimizers():
    """4 samples instead of 16 halve the rates of all optimizers with the square-root rule."""
    scale = AutoScale(base_batch=16, rule="sqrt")
    optim = OptimWrapperDict(first=wrapper(1.0), second=wrapper(0.5))
    scale.apply(optim, world_size=1, micro_batch=4)
    assert optim.get_lr() == {"first.lr": [0.5], "second.lr": [0.25]}


@pytest.mark.parametrize("settings", [None, {}, {"enable": False, "base_batch_size": 8, "rule": "sqrt"}])
def test_rates_are_not_scaled_unless_enabled(settings: Any):
    """Without ``enable=True``, the learning rates are not scaled."""
    assert AutoScale.parse(settings) is None


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"enable": True}, ConfigValueError, "base_batch_size must be .* got None"),
        ({"enable": True, "base_batch_size": 0}, ConfigValueError, "base_batch_size must be .* got 0"),
        ({"enable": True, "base_batch_size": True}, ConfigValueError, "base_batch_size must be .* got True"),
        ({"enable": False, "rule": "sqr"}, ConfigValueError, "'sqr'.*'sqrt'"),
        ({"enabled": True}, ConfigKeyError, "'enabled'.*'enable'"),
    ],
)
def test_invalid_settings_are_rejected(settings: Any, error: type[Exception], text: str):
    """Invalid settings raise an error with the value and the closest valid one."""
    with pytest.raises(error, match=text):
        AutoScale.parse(settings)
