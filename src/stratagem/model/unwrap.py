"""Tell modules that wrap a model from the model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["unwrap_model", "is_model_wrapper"]

_WRAPPERS = (DistributedDataParallel, DataParallel)


def is_model_wrapper(model: nn.Module) -> bool:
    """Tell whether a module only places another one, which it holds as ``module``."""
    return isinstance(model, _WRAPPERS)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside of its wrappers; a model's own attribute called ``module`` is left alone."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model
