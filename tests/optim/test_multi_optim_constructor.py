"""Separate optimizers for the parts of a model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import MultiOptimWrapperConstructor, OptimWrapperDict, build_optim_wrapper


def gan() -> nn.ModuleDict:
    """Return a model with two parts."""
    return nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))})


def test_each_part_gets_its_optimizer() -> None:
    """Each part has its own optimizer, rates and rules, and names may be dotted."""
    model = gan()
    built = build_optim_wrapper(
        model,
        dict(
            constructor=MultiOptimWrapperConstructor,
            generator=dict(optimizer=dict(type="AdamW", lr=0.1), paramwise_cfg=dict(bias_lr_mult=2.0)),
            **{"critic.1": dict(optimizer=dict(type="SGD", lr=0.5), accumulative_counts=2)},
        ),
    )
    assert isinstance(built, OptimWrapperDict)
    assert built.get_lr() == {"generator.lr": [0.1, 0.2], "critic.1.lr": [0.5]}
    assert built["critic.1"].accumulative_counts == 2
    assert built["critic.1"].param_groups[0]["params"][0] is model["critic"][1].weight


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        (dict(generatr=dict(optimizer=dict(type="SGD"))), ConfigKeyError, "Did you mean 'generator'"),
        (dict(generator="SGD"), ConfigTypeError, "must be a mapping"),
        (dict(generator=dict()), ConfigValueError, "has no 'optimizer'"),
        (dict(), ConfigValueError, "of at least one optimizer"),
        (
            dict(paramwise_cfg=dict(bias_lr_mult=2.0)),
            ConfigValueError,
            "paramwise_cfg must be specified for each submodule",
        ),
    ],
)
def test_invalid_parts_are_rejected(parts: dict[str, Any], error: type[Exception], text: str) -> None:
    """An invalid part raises an error with the closest name in the model."""
    with pytest.raises(error, match=text):
        build_optim_wrapper(gan(), dict(constructor=MultiOptimWrapperConstructor, **parts))
