"""Build an optimizer over groups of parameters with equal options, and the wrapper around it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.groups.parameter_info import ParameterInfo, ParameterTraits, iter_parameters
from stratagem.optim.groups.paramwise import ParamwiseRules, parse_paramwise
from stratagem.optim.implementation import implementation_options
from stratagem.registry import OPTIM_WRAPPERS, OPTIMIZERS
from stratagem.utils.names import did_you_mean

__all__ = ["DefaultOptimWrapperConstructor", "Group", "describe_groups", "group_parameters", "unwrap_data_parallel"]

logger = logging.getLogger(__name__)

_MULTIPLIED: Final = {"lr_mult": "lr", "decay_mult": "weight_decay"}


@final
@dataclass(slots=True)
class Group:
    """Parameters with equal options, in the order of the model, with their names."""

    options: dict[str, Any]
    names: list[str] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)


@final
class DefaultOptimWrapperConstructor:
    """Build the optimizer wrapper that a configuration describes for a model.

    Args:
        optim_wrapper_cfg: ``optimizer`` is a configuration, or a built optimizer; ``type`` names the wrapper
            (``OptimWrapper`` by default); ``implementation`` says how a torch optimizer computes: ``"auto"`` (the
            fastest there is), ``"fused"``, ``"foreach"`` or ``"loop"``. All else is for the wrapper.
        paramwise_cfg: rules for single parameters; see ``ParamwiseRules``.

    Raises:
        ConfigTypeError: if one of them is no mapping.
        ConfigValueError: if there is no ``optimizer``, or rules are given for one that is built.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if not isinstance(optim_wrapper_cfg, Mapping):
            raise ConfigTypeError(f"optim_wrapper must be a mapping, got {optim_wrapper_cfg!r}.")
        if "optimizer" not in optim_wrapper_cfg:
            near = did_you_mean("optimizer", optim_wrapper_cfg)
            raise ConfigValueError(f"optim_wrapper has no 'optimizer', only {sorted(optim_wrapper_cfg)}. {near}")
        self._wrapper_options = dict(optim_wrapper_cfg)
        self._optimizer = self._wrapper_options.pop("optimizer")
        self._implementation = self._wrapper_options.pop("implementation", "auto")
        self._has_rules = paramwise_cfg is not None
        self._rules = parse_paramwise(paramwise_cfg)
        if isinstance(self._optimizer, Optimizer) and (self._has_rules or "implementation" in optim_wrapper_cfg):
            raise ConfigValueError(
                "paramwise_cfg and implementation are for an optimizer that is built here; this one is built already: "
                f"{type(self._optimizer).__name__}. Give its configuration, or leave them out."
            )

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """Return the wrapper for the parameters of a model; ``freeze`` switches the gradients of some of them off."""
        optimizer = self._optimizer
        if not isinstance(optimizer, Optimizer):
            optimizer = self._build_optimizer(unwrap_data_parallel(model))
        wrapper = OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self._wrapper_options, "optimizer": optimizer})
        if not isinstance(wrapper, BaseOptimWrapper):
            raise ConfigTypeError(
                f"{self._wrapper_options['type']!r} built {wrapper!r}, which is no optimizer wrapper."
            )
        return wrapper

    def _build_optimizer(self, model: nn.Module) -> Any:
        if not isinstance(self._optimizer, Mapping):
            raise ConfigTypeError(f"optimizer must be a mapping with a type, or built, got {self._optimizer!r}.")
        options = dict(self._optimizer)
        kind = options.get("type")
        target = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        if not callable(target):
            return OPTIMIZERS.build(options)  # which says what is wrong
        signature = inspect.signature(target).parameters
        infos = self._trained(iter_parameters(model))
        groups = group_parameters(infos, self._rules, options, signature)
        if self._has_rules and logger.isEnabledFor(logging.INFO):
            logger.info("%s\n%s", kind, describe_groups(groups))
        options |= implementation_options(
            target,
            options,
            [parameter for group in groups for parameter in group.parameters],
            implementation=self._implementation,
            sparse_gradients=any(kind.has_sparse_gradient for kind in {info.kind for info in infos}),
        )
        params: Any = [{"params": group.parameters, **group.options} for group in groups]
        return OPTIMIZERS.build(options, default_args={next(iter(signature)): params})

    def _trained(self, infos: list[ParameterInfo]) -> list[ParameterInfo]:
        """Switch off the gradients of what ``freeze`` names, and return the rest."""
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
) -> list[Group]:
    """Return the parameters in groups of equal options; the one without options of its own comes first.

    Parameters without gradients stay in, so that they train once they are switched on.

    Args:
        infos: the parameters.
        rules: which options they get.
        options: the configuration of the optimizer, with the base learning rate and weight decay.
        signature: the arguments of the optimizer.

    Raises:
        ConfigValueError: if there is no parameter, a multiplier has nothing to multiply, or two names of one parameter
            have different options.
        ConfigKeyError: if a rule sets an option that the optimizer does not have.
    """
    if not infos:
        raise ConfigValueError("There is no parameter to train. Look at the model, and at freeze in paramwise_cfg.")
    depth = {} if rules.layer_decay is None else rules.layer_decay.multipliers([info.name for info in infos])
    base = _base_values(options, signature)
    groups: dict[str, Group] = {}
    # Most parameters of a large model share what decides about them: options are worked out once for each.
    decided: dict[tuple[str | None, ParameterTraits | None, float], Group] = {}
    seen: dict[int, tuple[str, Group]] = {}
    for name, parameter, kind in infos:
        key = rules.key_for(name) if rules.custom_keys else None
        decider = (key, kind if key is None else None, depth.get(name, 1.0))
        group = decided.get(decider)
        if group is None:
            said = rules.multipliers(kind) if key is None else dict(rules.custom_keys[key])
            own = _own_options(name, said, decider[2], base, signature)
            group = decided[decider] = groups.setdefault(repr(sorted(own.items())), Group(own))
        first_name, first_group = seen.setdefault(id(parameter), (name, group))
        if first_name is name:
            group.names.append(name)
            group.parameters.append(parameter)
        elif group is not first_group and not rules.bypass_duplicate:
            raise ConfigValueError(
                f"{first_name} and {name} are one parameter, but paramwise_cfg gives them different options: "
                f"{first_group.options} and {group.options}. Give them the same, or bypass_duplicate=True for those of "
                "the first."
            )
    _warn_of_unused_keys(rules, {key for key, _, _ in decided})
    return sorted((group for group in groups.values() if group.parameters), key=lambda group: bool(group.options))


def unwrap_data_parallel(model: nn.Module) -> nn.Module:
    """Return what torch's replicating wrappers hold, or the model itself: it may have a part called ``module``."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def describe_groups(groups: Sequence[Group]) -> str:
    """Return a table of what the groups are: options, tensors, elements, and the first of their names."""
    rows = [("options", "tensors", "elements", "such as")]
    for group in groups:
        said = ", ".join(f"{key}={value!r}" for key, value in group.options.items()) or "those of the optimizer"
        elements = sum(parameter.numel() for parameter in group.parameters)
        shown = ", ".join(group.names[:3]) + (", ..." if len(group.names) > 3 else "")
        rows.append((said, str(len(group.names)), f"{elements:,}", shown))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"  {said:<{widths[0]}}  {tensors:>{widths[1]}}  {elements:>{widths[2]}}  {names}"
        for said, tensors, elements, names in rows
    )


def _warn_of_unused_keys(rules: ParamwiseRules, used: set[str | None]) -> None:
    for key in rules.custom_keys:
        if key not in used:
            logger.warning("paramwise_cfg: no parameter is decided by custom_keys[%r].", key)


def _base_values(options: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return what multipliers multiply; a learning rate that is not given is the optimizer's default."""
    base = {key: options[key] for key in _MULTIPLIED.values() if options.get(key) is not None}
    if "lr" not in base and "lr" in signature and signature["lr"].default is not inspect.Parameter.empty:
        base["lr"] = signature["lr"].default
    return base


def _own_options(
    name: str,
    said: Mapping[str, Any],
    depth: float,
    base: Mapping[str, Any],
    signature: Mapping[str, inspect.Parameter],
) -> dict[str, Any]:
    """Return the options of a group that differ from those of the optimizer; ``name`` is its first parameter."""
    if depth != 1.0:
        said = {**said, "lr_mult": said.get("lr_mult", 1.0) * depth}
    own = {key: value for key, value in said.items() if key not in _MULTIPLIED}
    for key in own:
        if key not in signature and not any(item.kind is item.VAR_KEYWORD for item in signature.values()):
            raise ConfigKeyError(
                f"paramwise_cfg sets {key!r} for {name}, an option that the optimizer does not have. "
                f"{did_you_mean(key, [*signature, *_MULTIPLIED])}"
            )
    for multiplier, key in _MULTIPLIED.items():
        if said.get(multiplier) is None:
            continue
        value = own.get(key, base.get(key))
        if value is None:
            raise ConfigValueError(
                f"paramwise_cfg: {multiplier} of {name} multiplies {key}, which the optimizer's configuration does not "
                f"give. Add {key}=..."
            )
        if said[multiplier] != 1.0:
            own[key] = value * said[multiplier]
    return own
