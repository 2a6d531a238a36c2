"""Workarounds for DeepSpeed 0.19 while it creates its engine: scalar parameters, and a redundant broadcast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["scalars_as_vectors", "skip_broadcast"]

# DeepSpeed does not broadcast parameters with this attribute, which marks those that differ between ranks.
_EXCLUDE_FROM_BROADCAST = "ds_optim_param"


@contextmanager
def skip_broadcast(model: nn.Module) -> Iterator[None]:
    """While the engine is created, prevent it from broadcasting the weights of rank 0 again."""
    parameters = list(model.parameters())
    for parameter in parameters:
        setattr(parameter, _EXCLUDE_FROM_BROADCAST, True)
    try:
        yield
    finally:
        for parameter in parameters:
            delattr(parameter, _EXCLUDE_FROM_BROADCAST)


@contextmanager
def scalars_as_vectors(model: nn.Module) -> Iterator[None]:
    """Give scalar parameters the shape ``(1,)`` while stage 3 shards the parameters; they are gathered as scalars later."""
    scalars: list[Any] = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for scalar in scalars:
        scalar.data = scalar.data.view(1)
    yield
    for scalar in scalars:
        scalar.ds_shape = torch.Size()
        if scalar.numel():
            scalar.data = scalar.data.view(())
