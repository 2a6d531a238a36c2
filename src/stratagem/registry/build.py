"""Build objects from mappings with a ``type``."""

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
    """The registry methods that building an object requires."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> str: ...
    def get(self, key: str) -> Callable[..., Any] | None: ...
    def suggest(self, key: str) -> str: ...
    def switch_scope_and_registry(self, scope: str | None) -> Any: ...


def build_from_cfg(
    cfg: Mapping[str, Any], registry: SupportsBuild, default_args: Mapping[str, Any] | None = None
) -> Any:
    """Call the target specified by ``type``, with the other items of ``cfg`` as keyword arguments.

    ``type`` is a name in ``registry``, a class or a function. Nested mappings are not built; they are passed to the target
    unchanged. ``_scope_`` names the library whose registries are searched first, for this mapping and for everything that
    the target builds. An exception raised by the target is re-raised with a note on where the mapping is in the
    configuration.

    Args:
        cfg: The mapping to build from; it is not modified.
        registry: The registry in which ``type`` is looked up.
        default_args: Defaults for items that ``cfg`` does not have, including ``type``.

    Raises:
        ConfigTypeError: if ``cfg`` is not a mapping, has an argument that the target does not accept, or lacks a required
            argument.
        ConfigKeyError: if ``type`` is missing or unknown.
        ConfigValueError: if a data file sets an argument of this target that data files must not set.
    """
    arguments = _arguments(cfg, registry, default_args)
    if "type" not in arguments:
        raise ConfigKeyError(
            f"{_at(cfg)}the configuration of the {registry.name} has no key 'type'; its keys are {list(arguments)}."
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
                # Convert the keys to plain str, since some targets store them, as optimizers do in their state.
                return target(**{str(name): value for name, value in arguments.items()})
        except Exception as error:
            position = source_position(cfg)
            error.add_note(f"while building {_name(target)}" + (f" from {position}" if position else ""))
            if restricted:
                error.add_note(
                    "A data file set a part of this configuration, so weights are loaded with weights_only=True."
                )
            raise


def build_model_from_cfg(cfg: Any, registry: SupportsBuild, default_args: Mapping[str, Any] | None = None) -> Any:
    """Build a model; a list of models becomes a ``torch.nn.Sequential``."""
    if isinstance(cfg, list):
        return import_object("torch.nn:Sequential")(*(build_from_cfg(item, registry, default_args) for item in cfg))
    return build_from_cfg(cfg, registry, default_args)


def build_runner_from_cfg(cfg: Mapping[str, Any], registry: SupportsBuild) -> Any:
    """Build a runner by calling ``from_cfg`` of the class that ``runner_type`` names, ``Runner`` by default."""
    arguments = _arguments(cfg, registry, None)
    with registry.switch_scope_and_registry(arguments.get(_SCOPE)) as scoped:
        return _resolve(arguments.get("runner_type", "Runner"), scoped, cfg).from_cfg(cfg)


def _arguments(cfg: object, registry: SupportsBuild, default_args: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(cfg, Mapping):
        raise ConfigTypeError(f"The configuration of the {registry.name} must be a mapping with a 'type', got {cfg!r}.")
    if not (default_args is None or isinstance(default_args, Mapping)):
        raise ConfigTypeError(f"default_args must be a mapping or None, not {default_args!r}.")
    # A dict keeps the first of two equal keys, and the class of a key records whether a data file set the value.
    defaults = {key: value for key, value in (default_args or {}).items() if key not in cfg}
    return {key: resolve_all(value) for key, value in {**defaults, **cfg}.items()}


def _resolve(kind: object, registry: SupportsBuild, cfg: Mapping[str, Any]) -> Any:
    if not isinstance(kind, str):
        if callable(kind):
            return kind
        raise ConfigTypeError(f"{_at(cfg, 'type')}type must be a name, a class or a function, got {kind!r}.")
    target = registry.get(kind)
    if target is None:
        raise ConfigKeyError(
            f"{_at(cfg, 'type')}{kind!r} is not in the {registry.scope}::{registry.name} registry. "
            f"{registry.suggest(kind)}"
        )
    return target


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    taken = arguments_of(target)
    for name in arguments:
        if not taken.accepts(name):
            raise ConfigTypeError(
                f"{_at(cfg, name)}{_name(target)} takes no argument {name!r}. {did_you_mean(name, taken.names)}"
            )
    missing = [name for name in taken.names if name in taken.required and name not in arguments]
    if missing:
        raise ConfigTypeError(
            f"{_at(cfg)}{_name(target)} is missing required arguments: {', '.join(map(repr, missing))}."
        )


def _at(cfg: object, key: str | None = None) -> str:
    position = source_position(cfg, key)
    return f"{position}: " if position else ""


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or repr(target)
