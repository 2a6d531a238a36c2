"""Recognize and remove model wrappers, such as DistributedDataParallel."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["unwrap_model", "is_model_wrapper"]

_WRAPPERS = (DistributedDataParallel, DataParallel)


def is_model_wrapper(model: nn.Module) -> bool:
    """Return whether a module is a DDP or DataParallel wrapper, which holds the model as ``module``."""
    return isinstance(model, _WRAPPERS)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model without its wrappers. A model's own attribute ``module`` is not unwrapped."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model
