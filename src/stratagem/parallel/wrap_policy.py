"""Select submodules of a model by class, name or size, or with a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.registry import FUNCTIONS
from stratagem.utils.names import did_you_mean, refuse_unknown

__all__ = ["check_policy", "matches_name", "select_modules", "tied_outside"]

_KEYS: Final = ("classes", "modules", "min_params")
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def select_modules(model: nn.Module, policy: Any, what: str) -> dict[str, nn.Module]:
    """Return a mapping from names to the submodules of ``model`` that a policy selects, in model order.

    Args:
        model: the model to search; it is never selected.
        policy: None for the items of every ``ModuleList``; a class, the name of a class, or a list of them;
            ``dict(classes=...)``, ``dict(modules=[...])`` with patterns of names (``"layers.*"``, where ``*`` matches one
            component of a name) or ``dict(min_params=...)``; a function ``(name, module) -> bool``; or a mapping with the
            name of a registered function as its ``type``.
        what: the name of the option, for error messages.

    Raises:
        ConfigTypeError: if the policy has any other type.
        ConfigValueError: if the policy, or one of its classes or patterns, matches no module.
        PlacementError: if a selected module is a container, such as a ``ModuleList``, which has no ``forward``.
    """
    named = {name: module for name, module in model.named_modules() if name and _has_parameters(module)}
    chosen = {name: named[name] for name in _choose(model, named, policy, what)}
    for name, module in chosen.items():
        if isinstance(module, _CONTAINERS):
            raise PlacementError(
                f"{what} selects {name!r}, a {type(module).__name__}, which only contains modules and is never called. Select "
                f"its items: dict(modules=['{name}.*'])."
            )
    return chosen


def _choose(model: nn.Module, named: Mapping[str, nn.Module], policy: Any, what: str) -> list[str]:
    if policy is None:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        items = {item for each in lists for item in each if not isinstance(item, _CONTAINERS)}
        return [name for name, module in named.items() if module in items and not tied_outside(model, module)]
    if isinstance(policy, str | type):
        return _by_class(model, named, [policy], what)
    if isinstance(policy, Mapping):
        return _by_mapping(model, named, policy, what)
    if isinstance(policy, Sequence):
        return _by_class(model, named, policy, what)
    if callable(policy):
        return _by_function(named, policy, what)
    raise _wrong_type(policy, what)


def check_policy(policy: Any, what: str) -> None:
    """Check a policy as :func:`select_modules` does, without a model.

    Raises:
        ConfigKeyError: if a mapping has an unknown key.
        ConfigTypeError: if the policy has a wrong type.
        ConfigValueError: if a mapping is empty, or names an unknown function.
    """
    if isinstance(policy, Mapping):
        if "type" in policy:
            _function(policy, what)
            return
        refuse_unknown(policy, _KEYS, what)
        if not policy:
            raise ConfigValueError(f"{what} is empty; expected one of {', '.join(_KEYS)}.")
        if "min_params" in policy:
            _require_size(policy["min_params"], what)
    elif not (policy is None or isinstance(policy, str | type | Sequence) or callable(policy)):
        raise _wrong_type(policy, what)


def _wrong_type(policy: Any, what: str) -> ConfigTypeError:
    return ConfigTypeError(
        f"{what} must be class names, dict(classes=..., modules=... or min_params=...) or a function, got {policy!r}."
    )


def _function(policy: Mapping[str, Any], what: str) -> Callable[..., Any]:
    function = FUNCTIONS.get(policy["type"]) if isinstance(policy["type"], str) else policy["type"]
    if not callable(function):
        known = did_you_mean(str(policy["type"]), FUNCTIONS.names())
        raise ConfigValueError(f"{what}: type={policy['type']!r} is not a registered function. {known}")
    return function


def _require_size(min_params: Any, what: str) -> None:
    if isinstance(min_params, bool) or not isinstance(min_params, int) or min_params < 1:
        raise ConfigTypeError(
            f"{what}: min_params must be the minimum number of parameters, an integer >= 1, got {min_params!r}."
        )


def _by_mapping(model: nn.Module, named: Mapping[str, nn.Module], policy: Mapping[str, Any], what: str) -> list[str]:
    if "type" in policy:
        options = {key: value for key, value in policy.items() if key != "type"}
        function = _function(policy, what)
        return _by_function(named, lambda name, module: function(name, module, **options), what)
    check_policy(policy, what)
    chosen: set[str] = set()
    if "classes" in policy:
        classes = policy["classes"]
        chosen.update(_by_class(model, named, [classes] if isinstance(classes, str | type) else classes, what))
    if "modules" in policy:
        chosen.update(_by_pattern(named, policy["modules"], what))
    if "min_params" in policy:
        chosen.update(_by_size(model, named, policy["min_params"], what))
    return [name for name in named if name in chosen]


def _by_class(model: nn.Module, named: Mapping[str, nn.Module], classes: Iterable[Any], what: str) -> list[str]:
    chosen: set[str] = set()
    for wanted in classes:
        found = {name for name, module in named.items() if _is_a(module, wanted)}
        if not found:
            known = {type(module).__name__ for module in named.values()}
            shown = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", repr(wanted))
            raise ConfigValueError(
                f"{what}: no submodule of {type(model).__name__} with parameters is a {shown!r}. "
                f"{did_you_mean(str(shown), known)}"
            )
        chosen |= found
    return [name for name in named if name in chosen]


def _is_a(module: nn.Module, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return any(wanted in (base.__name__, f"{base.__module__}.{base.__qualname__}") for base in type(module).__mro__)


def _by_pattern(named: Mapping[str, nn.Module], patterns: str | Sequence[str], what: str) -> list[str]:
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in named if matches_name(name, pattern)}
        if not found:
            raise ConfigValueError(f"{what}: no module matches {pattern!r}. {did_you_mean(pattern, named)}")
        chosen |= found
    return [name for name in named if name in chosen]


def matches_name(name: str, pattern: str) -> bool:
    """Return whether a dotted name matches a pattern, in which ``*`` and ``?`` match characters of one component."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatchcase(part, each) for part, each in zip(parts, wanted, strict=True))


def _by_size(model: nn.Module, named: Mapping[str, nn.Module], min_params: int, what: str) -> list[str]:
    """Select modules, innermost first, with at least ``min_params`` parameters outside already selected modules."""
    chosen: list[str] = []
    taken: set[int] = set()
    for name, module in sorted(named.items(), key=lambda item: -item[0].count(".")):
        own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        fits = not isinstance(module, _CONTAINERS) and not tied_outside(model, module)
        if fits and sum(parameter.numel() for parameter in own) >= min_params:
            chosen.append(name)
            taken.update(map(id, own))
    if not chosen:
        total = sum(parameter.numel() for parameter in model.parameters())
        raise ConfigValueError(
            f"{what}: no submodule of {type(model).__name__}, which has {total} parameters, has at least {min_params}. Lower "
            "min_params."
        )
    return chosen


def _by_function(named: Mapping[str, nn.Module], function: Callable[..., Any], what: str) -> list[str]:
    alone = len(inspect.signature(function).parameters) == 1
    chosen = [name for name, module in named.items() if (function(module) if alone else function(name, module))]
    if not chosen:
        raise ConfigValueError(f"{what}: the function selects none of {len(named)} modules.")
    return chosen


def tied_outside(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the parameters of ``module`` that other modules of ``model`` share, keyed by their names in those modules."""
    inside = {id(part) for part in module.modules()}
    own = {id(parameter) for parameter in module.parameters()}
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if id(part) not in inside
        for name, parameter in part._parameters.items()
        if parameter is not None and id(parameter) in own
    ]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
