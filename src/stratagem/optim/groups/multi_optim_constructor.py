"""Build a separate optimizer wrapper for each of several submodules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import nn

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.groups.constructor import DefaultOptimWrapperConstructor
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
from stratagem.utils import unwrap_data_parallel
from stratagem.utils.names import did_you_mean

__all__ = ["MultiOptimWrapperConstructor"]


@final
class MultiOptimWrapperConstructor:
    """Build an ``OptimWrapperDict`` from one configuration per submodule.

    ``dict(constructor="MultiOptimWrapperConstructor", generator=dict(optimizer=...), critic=dict(optimizer=...))`` builds
    one optimizer for ``model.generator`` and one for ``model.critic``. Names may be dotted, and each submodule may have its
    own ``paramwise_cfg``.

    Args:
        optim_wrapper_cfg: maps the name of each submodule to the configuration of its wrapper.
        paramwise_cfg: must be None; set it per submodule.

    Raises:
        ConfigTypeError: if a configuration is not a mapping.
        ConfigValueError: if there is no configuration, or ``paramwise_cfg`` is set.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if paramwise_cfg is not None:
            raise ConfigValueError(
                "MultiOptimWrapperConstructor: paramwise_cfg must be specified for each submodule, next to its "
                "optimizer."
            )
        if not optim_wrapper_cfg:
            raise ConfigValueError(
                "MultiOptimWrapperConstructor requires the configuration of at least one optimizer, with the name of "
                "a submodule as its key."
            )
        self._constructors: dict[str, DefaultOptimWrapperConstructor] = {}
        for name, cfg in optim_wrapper_cfg.items():
            if not isinstance(cfg, Mapping):
                raise ConfigTypeError(f"optim_wrapper.{name} must be a mapping with an optimizer, got {cfg!r}.")
            rest = {key: value for key, value in cfg.items() if key != "paramwise_cfg"}
            self._constructors[name] = DefaultOptimWrapperConstructor(rest, cfg.get("paramwise_cfg"))

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """Return a wrapper for each configured submodule.

        Raises:
            ConfigKeyError: if the model does not have a submodule with one of these names.
        """
        submodules = dict(unwrap_data_parallel(model).named_modules())
        wrappers: dict[str, BaseOptimWrapper] = {}
        for name, constructor in self._constructors.items():
            if name not in submodules:
                known = [submodule for submodule in submodules if submodule and "." not in submodule]
                raise ConfigKeyError(f"optim_wrapper: the model has no submodule {name!r}. {did_you_mean(name, known)}")
            wrappers[name] = constructor(submodules[name])
        return OptimWrapperDict(**wrappers)
