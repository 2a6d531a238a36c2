"""One optimizer wrapper for each of several parts of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import nn

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.groups.constructor import DefaultOptimWrapperConstructor, unwrap_data_parallel
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
from stratagem.utils.names import did_you_mean

__all__ = ["MultiOptimWrapperConstructor"]


@final
class MultiOptimWrapperConstructor:
    """Build an ``OptimWrapperDict`` from configurations by the names of the model's parts.

    ``dict(constructor="MultiOptimWrapperConstructor", generator=dict(optimizer=...), critic=dict(optimizer=...))`` gives
    ``model.generator`` and ``model.critic`` an optimizer each. A name may be dotted, and each part may have its own
    ``paramwise_cfg``.

    Args:
        optim_wrapper_cfg: name of a part -> configuration of its wrapper.
        paramwise_cfg: refused; each part has its own.

    Raises:
        ConfigTypeError: if one of the configurations is no mapping.
        ConfigValueError: if there is none, or ``paramwise_cfg`` is given for all.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if paramwise_cfg is not None:
            raise ConfigValueError("Give each part of the model its own paramwise_cfg, next to its optimizer.")
        if not optim_wrapper_cfg:
            raise ConfigValueError("MultiOptimWrapperConstructor needs a configuration for each part of the model.")
        self._constructors: dict[str, DefaultOptimWrapperConstructor] = {}
        for name, cfg in optim_wrapper_cfg.items():
            if not isinstance(cfg, Mapping):
                raise ConfigTypeError(f"optim_wrapper.{name} must be a mapping with an optimizer, got {cfg!r}.")
            rest = {key: value for key, value in cfg.items() if key != "paramwise_cfg"}
            self._constructors[name] = DefaultOptimWrapperConstructor(rest, cfg.get("paramwise_cfg"))

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """Return a wrapper for each part of the model.

        Raises:
            ConfigKeyError: if the model has no part of a name.
        """
        parts = dict(unwrap_data_parallel(model).named_modules())
        wrappers: dict[str, BaseOptimWrapper] = {}
        for name, constructor in self._constructors.items():
            if name not in parts:
                known = [part for part in parts if part and "." not in part]
                raise ConfigKeyError(f"optim_wrapper: the model has no part {name!r}. {did_you_mean(name, known)}")
            wrappers[name] = constructor(parts[name])
        return OptimWrapperDict(**wrappers)
