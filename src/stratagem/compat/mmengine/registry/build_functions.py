"""Build objects from configurations."""

from __future__ import annotations

import inspect
from typing import Any

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.registry.registry import Registry
from stratagem.compat.mmengine.utils.manager import ManagerMixin
from stratagem.errors import ConfigKeyError, ConfigTypeError
from stratagem.utils import import_module, nearest_names

__all__ = [
    "build_from_cfg",
    "build_model_from_cfg",
    "build_optimizer_from_cfg",
    "build_runner_from_cfg",
    "build_scheduler_from_cfg",
]


def build_from_cfg(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build an object from ``cfg``: call the class or function that its ``type`` names with its other values.

    Args:
        cfg: a dict, ``ConfigDict`` or ``Config``. ``type`` is a name in the registry, or a class or function. ``_scope_`` is the
            default scope during the call.
        registry: where to look up the name; the registry of the default scope, if there is one, takes precedence.
        default_args: values for keys that ``cfg`` does not have.

    Raises:
        TypeError: if an argument or ``type`` has a wrong type.
        KeyError: if there is no ``type``, or its name is unknown.
    """
    if not isinstance(cfg, dict | Config):
        raise ConfigTypeError(f"cfg should be a dict, ConfigDict or Config, but got {type(cfg)}")
    if not (default_args is None or isinstance(default_args, dict | Config)):
        raise ConfigTypeError(
            f"default_args should be a dict, ConfigDict, Config or None, but got {type(default_args)}"
        )
    if "type" not in cfg and (default_args is None or "type" not in default_args):
        raise ConfigKeyError(f'`cfg` or `default_args` must contain the key "type", but got {cfg}\n{default_args}')
    if not isinstance(registry, Registry):
        raise ConfigTypeError(f"registry must be a mmengine.Registry object, but got {type(registry)}")
    arguments = _merged(cfg, default_args)
    with registry.switch_scope_and_registry(arguments.pop("_scope_", None)) as found:
        target = _target_of(arguments.pop("type"), found)
        if inspect.isclass(target) and issubclass(target, ManagerMixin):
            return target.get_instance(**arguments)
        return target(**arguments)


def build_runner_from_cfg(cfg: Any, registry: Registry) -> Any:
    """Build a runner with ``from_cfg`` of the class that the key ``runner_type`` names, which is ``Runner`` by default.

    Raises:
        AssertionError: if an argument has a wrong type.
        TypeError, KeyError: as for :func:`build_from_cfg`.
    """
    _require_cfg_and_registry(cfg, registry)
    arguments = cfg.copy()
    with registry.switch_scope_and_registry(arguments.pop("_scope_", None)) as found:
        return _target_of(arguments.get("runner_type", "Runner"), found).from_cfg(arguments)


def build_model_from_cfg(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build a module from ``cfg``, or a ``Sequential`` of modules from a list; see :func:`build_from_cfg`."""
    if not isinstance(cfg, list):
        return build_from_cfg(cfg, registry, default_args)
    modules = [build_from_cfg(item, registry, default_args) for item in cfg]
    return import_module("stratagem.compat.mmengine.model").Sequential(*modules)


def build_optimizer_from_cfg(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build an optimizer; see :func:`build_from_cfg`."""
    return build_from_cfg(cfg, registry, default_args)


def build_scheduler_from_cfg(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build a parameter scheduler; see :func:`build_from_cfg`.

    With ``convert_to_iter_based=True``, the ranges in epochs are converted to iterations, for which ``epoch_length`` is needed.

    Raises:
        AssertionError: if an argument has a wrong type, or the scheduler cannot be converted.
    """
    _require_cfg_and_registry(cfg, registry)
    arguments = _merged(cfg, default_args)
    with registry.switch_scope_and_registry(arguments.pop("_scope_", None)) as found:
        if not arguments.pop("convert_to_iter_based", False):
            arguments.pop("epoch_length", None)
            return build_from_cfg(arguments, found)
        if "epoch_length" not in arguments or not arguments.get("by_epoch", True):
            raise InvalidArgumentError(
                "convert_to_iter_based=True needs a scheduler with by_epoch=True, and epoch_length, the number of iterations "
                f"in an epoch; got {arguments}."
            )
        return _target_of(arguments.pop("type"), found).build_iter_from_epoch(**arguments)


def _require_cfg_and_registry(cfg: Any, registry: Any) -> None:
    require(isinstance(cfg, dict | Config), f"cfg should be a dict, ConfigDict or Config, but got {type(cfg)}")
    require(isinstance(registry, Registry), f"registry should be a mmengine.Registry object, but got {type(registry)}")


def _merged(cfg: Any, default_args: Any) -> Any:
    arguments = cfg.copy()
    for name, value in (default_args or {}).items():
        arguments.setdefault(name, value)
    return arguments


def _target_of(kind: Any, registry: Registry) -> Any:
    if isinstance(kind, str):
        found = registry.get(kind)
        if found is None:
            near = nearest_names(kind, _names(registry))
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ConfigKeyError(
                f"{kind} is not in the {registry.scope}::{registry.name} registry.{hint} If it is a class of yours, import its "
                "module first, for example with custom_imports=dict(imports=[...]) in the configuration."
            )
        return found
    if callable(kind):
        return kind
    raise ConfigTypeError(f"type must be a str or valid type, but got {type(kind)}")


def _names(registry: Registry) -> set[str]:
    names: set[str] = set()
    current: Registry | None = registry
    while current is not None:
        names.update(current.module_dict)
        current = current.parent
    return names
