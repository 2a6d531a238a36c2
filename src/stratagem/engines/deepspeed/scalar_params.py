"""Parameters that are single numbers, which DeepSpeed 0.19 does not know: a tensor of no dimension has no bytes to view."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["as_vectors", "broadcast_already"]

# By it DeepSpeed tells parameters that are not equal on all ranks, so that it leaves them alone.
_NOT_EQUAL = "ds_optim_param"


@contextmanager
def broadcast_already(model: nn.Module) -> Iterator[None]:
    """Keep the engine from sending rank 0's weights again, while it is made."""
    parameters = list(model.parameters())
    for parameter in parameters:
        setattr(parameter, _NOT_EQUAL, True)
    try:
        yield
    finally:
        for parameter in parameters:
            delattr(parameter, _NOT_EQUAL)


@contextmanager
def as_vectors(model: nn.Module) -> Iterator[None]:
    """Let numbers be vectors of one element while stage 3 cuts the parameters; afterwards they are gathered as numbers."""
    numbers: list[Any] = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for number in numbers:
        number.data = number.data.view(1)
    yield
    for number in numbers:
        number.ds_shape = torch.Size()
        if number.numel():
            number.data = number.data.view(())
