"""Build an optimizer with parameter groups, and its wrapper."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.groups.parameter_info import ParameterInfo, ParameterTraits, iter_parameters
from stratagem.optim.groups.paramwise import ParamwiseRules, parse_paramwise
from stratagem.optim.groups.parts import (
    PartRules,
    assign_parameters,
    describe_assignment,
    parse_parts,
    require_matrices,
)
from stratagem.optim.implementation import implementation_options
from stratagem.optim.mixed import MixedOptimizer
from stratagem.optim.schedules.chain import record_references
from stratagem.registry import OPTIM_WRAPPERS, OPTIMIZERS
from stratagem.utils import unwrap_data_parallel
from stratagem.utils.names import did_you_mean

__all__ = ["DefaultOptimWrapperConstructor", "Group", "describe_groups", "group_parameters"]

logger = logging.getLogger(__name__)

_MULTIPLIED: Final = {"lr_mult": "lr", "decay_mult": "weight_decay"}


@final
@dataclass(slots=True)
class Group:
    """Parameters with the same options, in model order, and their names."""

    options: dict[str, Any]
    names: list[str] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)


@final
class DefaultOptimWrapperConstructor:
    """Build an optimizer wrapper for a model from a configuration.

    Args:
        optim_wrapper_cfg: ``optimizer`` is a configuration or an optimizer object; ``type`` is the wrapper
            (``OptimWrapper`` by default); ``implementation`` selects the implementation of a torch optimizer: ``"auto"``
            (the fastest one), ``"fused"``, ``"foreach"`` or ``"loop"``. Other keys are arguments of the wrapper.
        paramwise_cfg: rules per parameter; see ``ParamwiseRules``.

    Raises:
        ConfigTypeError: if an argument is not a mapping.
        ConfigValueError: if ``optimizer`` is missing, or there are rules for an optimizer that is already built.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if not isinstance(optim_wrapper_cfg, Mapping):
            raise ConfigTypeError(f"optim_wrapper must be a mapping, got {optim_wrapper_cfg!r}.")
        if "optimizer" not in optim_wrapper_cfg:
            near = did_you_mean("optimizer", optim_wrapper_cfg)
            raise ConfigValueError(
                f"optim_wrapper has no 'optimizer'; its keys are {sorted(optim_wrapper_cfg)}. {near}"
            )
        self._wrapper_options = dict(optim_wrapper_cfg)
        self._optimizer = self._wrapper_options.pop("optimizer")
        self._implementation = self._wrapper_options.pop("implementation", "auto")
        self._has_rules = paramwise_cfg is not None
        self._rules = parse_paramwise(paramwise_cfg)
        if isinstance(self._optimizer, Optimizer) and (self._has_rules or "implementation" in optim_wrapper_cfg):
            raise ConfigValueError(
                "paramwise_cfg and implementation require the configuration of an optimizer, but the optimizer is a "
                f"{type(self._optimizer).__name__} object. Pass the configuration of the optimizer, or omit these "
                "options."
            )

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """Return the wrapper for a model; parameters that match ``freeze`` get ``requires_grad=False``."""
        optimizer = self._optimizer
        if not isinstance(optimizer, Optimizer):
            optimizer = self._build_optimizer(unwrap_data_parallel(model))
        wrapper = OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self._wrapper_options, "optimizer": optimizer})
        if not isinstance(wrapper, BaseOptimWrapper):
            raise ConfigTypeError(
                f"{self._wrapper_options['type']!r} returned {wrapper!r}, which is not an optimizer wrapper."
            )
        return wrapper

    def _build_optimizer(self, model: nn.Module) -> Any:
        if not isinstance(self._optimizer, Mapping):
            raise ConfigTypeError(
                f"optimizer must be a mapping with a type or an optimizer object, got {self._optimizer!r}."
            )
        options = dict(self._optimizer)
        if _target_of(options) is MixedOptimizer:
            return self._build_mixed(parse_parts(options), model)
        infos = self._freeze(iter_parameters(model))
        depth = self._rules.depth_multipliers([info.name for info in infos])
        built, used = self._build_one(options, infos, depth)
        self._warn_of_unused_keys(used)
        return built

    def _build_mixed(self, rules: PartRules, model: nn.Module) -> MixedOptimizer:
        infos = self._freeze(iter_parameters(model))
        assignment = assign_parameters(infos, rules, model)
        logger.info(describe_assignment(rules, assignment))
        depth = self._rules.depth_multipliers([info.name for info in infos])
        parts, used = {}, set[str | None]()
        for name, some in assignment.infos.items():
            require_matrices(name, rules.parts[name], some)
            parts[name], keys = self._build_one(dict(rules.parts[name]), some, depth, name)
            used |= keys
        self._warn_of_unused_keys(used)
        return MixedOptimizer(parts)

    def _build_one(
        self, options: dict[str, Any], infos: Sequence[ParameterInfo], depth: Mapping[str, float], part: str = ""
    ) -> tuple[Any, set[str | None]]:
        """Return an optimizer, and the custom keys that match its parameters."""
        target = _target_of(options)
        if not callable(target):
            return OPTIMIZERS.build(options), set()  # Raises an error.
        signature = inspect.signature(target).parameters
        groups, used = group_parameters(infos, self._rules, options, signature, depth)
        if self._has_rules and logger.isEnabledFor(logging.INFO):
            logger.info("%s\n%s", f"{part} ({options['type']})" if part else options["type"], describe_groups(groups))
        options |= implementation_options(
            target,
            options,
            [parameter for group in groups for parameter in group.parameters],
            implementation=self._implementation,
            sparse_gradients=any(traits.has_sparse_gradient for traits in {info.traits for info in infos}),
        )
        params: Any = [{"params": group.parameters, **group.options} for group in groups]
        built = OPTIMIZERS.build(options, default_args={next(iter(signature)): params})
        if isinstance(built, Optimizer):
            record_references(built)
        return built, used

    def _warn_of_unused_keys(self, used: set[str | None]) -> None:
        for key in self._rules.custom_keys:
            if key not in used:
                logger.warning("paramwise_cfg: custom_keys[%r] does not match any parameter.", key)

    def _freeze(self, infos: list[ParameterInfo]) -> list[ParameterInfo]:
        """Disable the gradients of parameters that match ``freeze``, and return the remaining parameters."""
        if not self._rules.freeze:
            return infos
        frozen = {info.name for info in infos if any(re.search(each, info.name) for each in self._rules.freeze)}
        for info in infos:
            if info.name in frozen:
                info.parameter.requires_grad = False
        logger.info("Froze %d of %d parameters.", len(frozen), len(infos))
        return [info for info in infos if info.name not in frozen]


def group_parameters(
    infos: Sequence[ParameterInfo],
    rules: ParamwiseRules,
    options: Mapping[str, Any],
    signature: Mapping[str, inspect.Parameter],
    depth: Mapping[str, float],
) -> tuple[list[Group], set[str | None]]:
    """Group parameters by their options; the group with the optimizer's default options comes first.

    Also return the custom keys that match a parameter.

    Parameters with ``requires_grad=False`` are included, so that they can be unfrozen later.

    Args:
        infos: the parameters.
        rules: the rules for their options.
        options: the configuration of the optimizer, with the base learning rate and weight decay.
        signature: the parameters of the optimizer's constructor.
        depth: the learning rate multiplier of each name according to ``layer_decay``; 1 if it is missing.

    Raises:
        ConfigValueError: if there are no parameters, a multiplier has no base value, or two names of a shared parameter
            have different options.
        ConfigKeyError: if a rule sets an unknown option.
    """
    if not infos:
        raise ConfigValueError(
            "The model has no parameters to train. Check the model and the option 'freeze' in paramwise_cfg."
        )
    base = _base_values(options, signature)
    groups: dict[str, Group] = {}
    # Most parameters of a large model share the same key, traits and depth, so compute the options once per combination.
    cache: dict[tuple[str | None, ParameterTraits | None, float], Group] = {}
    seen: dict[int, tuple[str, Group]] = {}
    for name, parameter, traits in infos:
        key = rules.key_for(name) if rules.custom_keys else None
        cache_key = (key, traits if key is None else None, depth.get(name, 1.0))
        group = cache.get(cache_key)
        if group is None:
            rule = rules.multipliers(traits) if key is None else dict(rules.custom_keys[key])
            own = _group_options(name, rule, cache_key[2], base, signature)
            group = cache[cache_key] = groups.setdefault(repr(sorted(own.items())), Group(own))
        first_name, first_group = seen.setdefault(id(parameter), (name, group))
        if first_name is name:
            group.names.append(name)
            group.parameters.append(parameter)
        elif group is not first_group and not rules.bypass_duplicate:
            raise ConfigValueError(
                f"{first_name} and {name} are the same parameter, but paramwise_cfg sets different options for them: "
                f"{first_group.options} and {group.options}. Make them equal, or set bypass_duplicate=True to use the "
                "options of the first name."
            )
    filled = (group for group in groups.values() if group.parameters)
    return sorted(filled, key=lambda group: bool(group.options)), {key for key, _, _ in cache}


def describe_groups(groups: Sequence[Group]) -> str:
    """Return a table of the groups: options, number of tensors and elements, and first parameter names."""
    rows = [("options", "tensors", "elements", "parameters")]
    for group in groups:
        options = ", ".join(f"{key}={value!r}" for key, value in group.options.items()) or "optimizer defaults"
        elements = sum(parameter.numel() for parameter in group.parameters)
        shown = ", ".join(group.names[:3]) + (", ..." if len(group.names) > 3 else "")
        rows.append((options, str(len(group.names)), f"{elements:,}", shown))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"  {options:<{widths[0]}}  {tensors:>{widths[1]}}  {elements:>{widths[2]}}  {names}"
        for options, tensors, elements, names in rows
    )


def _target_of(options: Mapping[str, Any]) -> Any:
    """Return what the ``type`` of an optimizer's configuration refers to."""
    kind = options.get("type")
    return OPTIMIZERS.get(kind) if isinstance(kind, str) else kind


def _base_values(options: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the base values of the multipliers; the learning rate defaults to the optimizer's learning rate."""
    base = {key: options[key] for key in _MULTIPLIED.values() if options.get(key) is not None}
    if "lr" not in base and "lr" in signature and signature["lr"].default is not inspect.Parameter.empty:
        base["lr"] = signature["lr"].default
    return base


def _group_options(
    name: str,
    rule: Mapping[str, Any],
    depth: float,
    base: Mapping[str, Any],
    signature: Mapping[str, inspect.Parameter],
) -> dict[str, Any]:
    """Return the options of a group that differ from the optimizer's; ``name`` is its first parameter."""
    if depth != 1.0:
        rule = {**rule, "lr_mult": rule.get("lr_mult", 1.0) * depth}
    own = {key: value for key, value in rule.items() if key not in _MULTIPLIED}
    for key in own:
        if key not in signature and not any(item.kind is item.VAR_KEYWORD for item in signature.values()):
            raise ConfigKeyError(
                f"paramwise_cfg sets {key!r} for {name}, but the optimizer has no such option. "
                f"{did_you_mean(key, [*signature, *_MULTIPLIED])}"
            )
    for multiplier, key in _MULTIPLIED.items():
        if rule.get(multiplier) is None:
            continue
        value = own.get(key, base.get(key))
        if value is None and rule[multiplier] == 1.0:
            continue
        if value is None:
            raise ConfigValueError(
                f"paramwise_cfg: {multiplier} of {name} multiplies {key}, which the optimizer's configuration does not "
                f"set. Add {key}=..."
            )
        if rule[multiplier] != 1.0:
            own[key] = value * rule[multiplier]
    return own
