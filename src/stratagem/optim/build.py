"""Build optimizer wrappers from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stratagem.errors import ConfigTypeError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
from stratagem.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["build_optim_wrapper"]


def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> BaseOptimWrapper | OptimWrapperDict:
    """Build the optimizer wrapper, or an ``OptimWrapperDict``, for a model from a configuration.

    ``constructor`` is the type of the constructor (``DefaultOptimWrapperConstructor`` by default), which receives
    ``paramwise_cfg`` and the rest of the configuration.

    Raises:
        ConfigTypeError: if the configuration is not a mapping, or the constructor returns something else.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigTypeError(f"optim_wrapper must be a mapping, got {type(cfg).__name__}: {cfg!r}.")
    rest = dict(cfg)
    kind = rest.pop("constructor", "DefaultOptimWrapperConstructor")
    paramwise_cfg = rest.pop("paramwise_cfg", None)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {"type": kind, "optim_wrapper_cfg": rest, "paramwise_cfg": paramwise_cfg}
    )
    built = constructor(model)
    if not isinstance(built, BaseOptimWrapper | OptimWrapperDict):
        raise ConfigTypeError(f"The constructor {kind!r} returned {built!r}, which is not an optimizer wrapper.")
    return built
