"""Build what a mapping with a ``type`` describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from stratagem.errors import ConfigKeyError, ConfigTypeError
from stratagem.registry.import_policy import is_of_allowed_package
from stratagem.utils import did_you_mean, import_object
from stratagem.utils.data_names import DataName, unmark_data
from stratagem.utils.data_rules import is_restricted, refuse_data_arguments, weights_only_loads
from stratagem.utils.lazy import resolve_all
from stratagem.utils.signatures import arguments_of
from stratagem.utils.source_positions import source_position

__all__ = ["SupportsBuild", "build_from_cfg", "build_model_from_cfg", "build_runner_from_cfg"]

_SCOPE = "_scope_"


class SupportsBuild(Protocol):
    """What building needs of a registry."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> str: ...
    def get(self, key: str) -> Callable[..., Any] | None: ...
    def names(self) -> list[str]: ...
    def switch_scope_and_registry(self, scope: str | None) -> Any: ...


def build_from_cfg(
    cfg: Mapping[str, Any], registry: SupportsBuild, default_args: Mapping[str, Any] | None = None
) -> Any:
    """Call what the ``type`` of ``cfg`` names with the other items of ``cfg`` as arguments.

    ``type`` is a name in ``registry``, a class or a function. Only this node is built: arguments that are mappings
    themselves are handed on as they are. ``_scope_`` names the library whose names go first for this node and all that
    its target builds. An exception from the target keeps its class and gets a note with the place in the configuration.

    Args:
        cfg: What to build; it is not changed.
        registry: Where ``type`` is looked up.
        default_args: Arguments, or the ``type``, for what ``cfg`` does not give.

    Raises:
        ConfigTypeError: if ``cfg`` is not a mapping, or the target does not take an argument or misses one.
        ConfigKeyError: if there is no ``type`` or its name is unknown.
        ConfigValueError: if a data file gives an argument that it must not give to this target.
    """
    arguments = _arguments(cfg, registry, default_args)
    if "type" not in arguments:
        raise ConfigKeyError(
            f"{_at(cfg)}a {registry.name} is described by a mapping with the key 'type', "
            f"and there is none among {list(arguments)}."
        )
    kind = arguments.pop("type")
    with registry.switch_scope_and_registry(arguments.pop(_SCOPE, None)) as scoped:
        target = _resolve(kind, scoped, cfg)
        _check_arguments(target, arguments, cfg)
        given = {"type": kind, **{name: value for name, value in arguments.items() if name in cfg}}
        allowed = isinstance(kind, DataName) and is_of_allowed_package(kind)
        restricted = not allowed and is_restricted(target, given)
        if restricted:
            arguments = unmark_data(arguments | refuse_data_arguments(target, given, _at(cfg)))
        try:
            with weights_only_loads() if restricted else nullcontext():
                # Plain names, since some targets keep them, as optimizers do in their state.
                return target(**{str(name): value for name, value in arguments.items()})
        except Exception as error:
            position = source_position(cfg)
            error.add_note(f"while building {_name(target)}" + (f" from {position}" if position else ""))
            if restricted:
                error.add_note("A data file gave a part of this, so files of weights are read without pickle.")
            raise


def build_model_from_cfg(cfg: Any, registry: SupportsBuild, default_args: Mapping[str, Any] | None = None) -> Any:
    """Build a model; a list of models becomes a ``torch.nn.Sequential``."""
    if isinstance(cfg, list):
        return import_object("torch.nn:Sequential")(*(build_from_cfg(item, registry, default_args) for item in cfg))
    return build_from_cfg(cfg, registry, default_args)


def build_runner_from_cfg(cfg: Mapping[str, Any], registry: SupportsBuild) -> Any:
    """Build the runner that ``runner_type`` names (``Runner`` by default) with its ``from_cfg``."""
    arguments = _arguments(cfg, registry, None)
    with registry.switch_scope_and_registry(arguments.get(_SCOPE)) as scoped:
        return _resolve(arguments.get("runner_type", "Runner"), scoped, cfg).from_cfg(cfg)


def _arguments(cfg: object, registry: SupportsBuild, default_args: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(cfg, Mapping):
        raise ConfigTypeError(f"A {registry.name} is described by a mapping with a 'type', not by {cfg!r}.")
    if not (default_args is None or isinstance(default_args, Mapping)):
        raise ConfigTypeError(f"default_args must be a mapping or None, not {default_args!r}.")
    # A dict keeps the key object that it had first, and a key records whether a data file gave the value.
    defaults = {key: value for key, value in (default_args or {}).items() if key not in cfg}
    return {key: resolve_all(value) for key, value in {**defaults, **cfg}.items()}


def _resolve(kind: object, registry: SupportsBuild, cfg: Mapping[str, Any]) -> Any:
    if not isinstance(kind, str):
        if callable(kind):
            return kind
        raise ConfigTypeError(f"{_at(cfg, 'type')}type must be a name, a class or a function, not {kind!r}.")
    target = registry.get(kind)
    if target is None:
        raise ConfigKeyError(
            f"{_at(cfg, 'type')}{kind!r} is not in the {registry.scope}::{registry.name} registry. "
            f"{did_you_mean(kind, registry.names())}"
        )
    return target


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    taken = arguments_of(target)
    for name in arguments:
        if not taken.accept(name):
            raise ConfigTypeError(
                f"{_at(cfg, name)}{_name(target)} takes no argument {name!r}. {did_you_mean(name, taken.names)}"
            )
    missing = [name for name in taken.names if name in taken.required and name not in arguments]
    if missing:
        raise ConfigTypeError(f"{_at(cfg)}{_name(target)} needs {', '.join(map(repr, missing))}, not given here.")


def _at(cfg: object, key: str | None = None) -> str:
    position = source_position(cfg, key)
    return f"{position}: " if position else ""


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or repr(target)
