"""Build optimizer wrappers and schedulers for a stand-in model, to check their configuration before a model exists."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final, final

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from stratagem.optim import (
    AmpOptimWrapper,
    BaseOptimWrapper,
    OptimWrapper,
    OptimWrapperDict,
    ParamScheduler,
    build_param_schedulers,
)
from stratagem.optim.groups.constructor import DefaultOptimWrapperConstructor
from stratagem.optim.groups.multi_optim_constructor import MultiOptimWrapperConstructor
from stratagem.optim.groups.parts import parse_parts
from stratagem.optim.mixed import MixedOptimizer
from stratagem.parallel import AnyOptim
from stratagem.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from stratagem.strategies.setup.building import build_optim_wrapper
from stratagem.utils.torch_private import without_compiler_import

__all__ = ["StandInOptimizer", "try_optim_wrapper", "try_param_schedulers"]

_OWN: Final = __name__.partition(".")[0]
# The assumed number of iterations per epoch. It is large, so that a range of iterations never ends before it begins.
_EPOCH_LENGTH: Final = 10**6


@final
class StandInOptimizer(SGD):
    """Stands for an optimizer that is not built, because it is not one of torch's optimizers or is already in use."""


@without_compiler_import()
def try_optim_wrapper(optim: Any) -> AnyOptim | None:
    """Build an optimizer wrapper for a model with one parameter, without ``paramwise_cfg``.

    Only the classes of this package and torch's optimizers are built: other optimizers are replaced by a
    :class:`StandInOptimizer`, and other wrappers by an ``OptimWrapper``.

    Returns:
        The wrapper, or None if a custom constructor builds it.

    Raises:
        ConfigError: (or a subclass) if an argument is invalid. Other exceptions of torch's optimizers are not converted.
    """
    if not isinstance(optim, Mapping):
        return build_optim_wrapper(optim)
    given = optim.get("constructor")
    name = given.get("type") if isinstance(given, Mapping) else given
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(name) if isinstance(name, str) else name
    rest = {key: value for key, value in optim.items() if key != "paramwise_cfg"}
    if constructor is MultiOptimWrapperConstructor:
        names = [key for key in rest if key != "constructor"]
        wrappers = {key: _known(value) if isinstance(value, Mapping) else value for key, value in rest.items()}
        return build_optim_wrapper(wrappers, _model(names))
    if constructor not in (None, DefaultOptimWrapperConstructor):
        return None
    return build_optim_wrapper(_known(rest), _model([]))


def try_param_schedulers(
    spec: Any, optim: AnyOptim | None, *, train_cfg: Any, custom_groups: bool
) -> list[ParamScheduler]:
    """Build the schedulers of this package for copies of the optimizers, which share no state with them; return the schedulers.

    Schedulers that are already built, and those of other packages, are skipped.

    Args:
        spec: the configuration of the schedulers.
        optim: the wrapper that :func:`try_optim_wrapper` returned.
        train_cfg: the configuration of the training loop, whose length is the end of a schedule.
        custom_groups: whether the number of parameter groups is unknown, because it depends on the model.

    Raises:
        ConfigError: (or a subclass) if an argument is invalid.
    """
    by_name = isinstance(spec, Mapping) and "type" not in spec
    if optim is None and by_name:
        return []  # The names of the optimizers are unknown.
    tried: Any = (
        {name: _tried(value, custom_groups=custom_groups) for name, value in spec.items()}
        if by_name
        else _tried(spec, custom_groups=custom_groups)
    )
    options = {_option(item) for some in (tried.values() if by_name else [tried]) for item in some}
    wrappers: dict[str, BaseOptimWrapper | None] = {"": None} if optim is None else dict(optim.each())
    copies = {name: _copy(wrapper, options - {None}) for name, wrapper in wrappers.items()}
    max_epochs, max_iters = _lengths(train_cfg, next(iter(copies.values())).accumulative_counts)
    built = build_param_schedulers(
        tried,
        OptimWrapperDict(**copies) if isinstance(optim, OptimWrapperDict) else copies[""],
        epoch_length=_EPOCH_LENGTH,
        max_epochs=max_epochs,
        max_iters=max_iters,
    )
    return [each for some in built.values() for each in some] if isinstance(built, dict) else built


def _model(names: list[str]) -> nn.Module:
    """Return a model with one matrix in each named submodule; without names, the model itself has the matrix."""
    model = nn.Module()
    for name in names or [""]:
        module = model
        for part in name.split(".") if name else ():
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter("weight", nn.Parameter(torch.zeros(1, 1)))
    return model


def _known(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a wrapper without classes of other packages."""
    known = {key: value for key, value in cfg.items() if key != "paramwise_cfg"}
    if "optimizer" not in cfg:
        return known
    kind = cfg.get("type", "OptimWrapper")
    wrapper = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if wrapper is not None and _package(wrapper)[0] != _OWN:
        known = {key: value for key, value in known.items() if key in ("optimizer", "implementation")}
    optimizer = known["optimizer"]
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    target = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    if target is MixedOptimizer:
        # Which parameters belong to a part depends on the model, so the parts are built without its rules.
        parts = parse_parts(optimizer).parts
        known["optimizer"] = MixedOptimizer(
            {
                name: build_optim_wrapper(_known({**known, "optimizer": part}), _model([])).each()[""].optimizer
                for name, part in parts.items()
            }
        )
        known.pop("implementation", None)
    elif target is not None and _package(target)[:2] != ["torch", "optim"]:
        known.pop("implementation", None)
        known["optimizer"] = StandInOptimizer([nn.Parameter(torch.zeros(1, 1))], lr=0.1)
    if wrapper is AmpOptimWrapper and known.get("dtype") is None:
        # The default depends on the device. A loss scale is only valid for float16.
        known["dtype"] = "float16" if "loss_scale" in known else "bfloat16"
    return known


def _package(target: Any) -> list[str]:
    return str(getattr(target, "__module__", "")).split(".")


def _tried(spec: Any, *, custom_groups: bool) -> list[Any]:
    """Return the items of a specification that can be tried."""
    items = spec if isinstance(spec, list | tuple) else [spec]
    return [
        _plain(item, custom_groups=custom_groups)
        for item in items
        if not isinstance(item, ParamScheduler) and not _is_foreign(item)
    ]


def _is_foreign(item: Any) -> bool:
    target = _target(item)
    return target is not None and _package(target)[0] not in (_OWN, "torch")


def _target(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, Mapping) else None
    return PARAM_SCHEDULERS.get(kind) if isinstance(kind, str) else kind


def _plain(item: Any, *, custom_groups: bool) -> Any:
    """Return a configuration that logs nothing and, if the groups are unknown, has no values per group."""
    if not isinstance(item, Mapping):
        return item
    lists = getattr(getattr(_target(item), "settings_type", None), "per_group", ()) if custom_groups else ()
    firsts = {key: item[key][0] for key in lists if isinstance(item.get(key), list | tuple) and item[key]}
    return {**item, **firsts, **({"verbose": False} if "verbose" in item else {})}


def _option(item: Any) -> str | None:
    """Return the option of the parameter groups that a configuration schedules; None if it is unknown."""
    key = getattr(_target(item), "key", None)
    return key if key is not None or not isinstance(item, Mapping) else item.get("param_name")


def _copy(wrapper: BaseOptimWrapper | None, options: set[Any]) -> OptimWrapper:
    """Return a wrapper of a copy of an optimizer. The groups of a stand-in have all options."""
    optimizer = None if wrapper is None else wrapper.optimizer
    if isinstance(optimizer, MixedOptimizer):
        parts = {name: _copy_optimizer(part, options) for name, part in optimizer.parts.items()}
        copied: Optimizer = MixedOptimizer(parts)
    else:
        copied = _copy_optimizer(optimizer, options)
    built = OptimWrapper(copied)
    built.accumulative_counts = 1 if wrapper is None else wrapper.accumulative_counts
    return built


def _copy_optimizer(optimizer: Optimizer | None, options: set[Any]) -> Optimizer:
    groups = [{}] if optimizer is None else [dict(group) for group in optimizer.param_groups]
    if optimizer is not None and _package(type(optimizer))[:2] == ["torch", "optim"]:
        copied = copy.copy(optimizer)
        copied.param_groups = groups
    else:
        copied = StandInOptimizer([nn.Parameter(torch.zeros(1, 1))], lr=0.1)
        defaults = {**dict.fromkeys(options, 0.1), **copied.param_groups[0]}
        copied.param_groups = [{**defaults, **group} for group in groups]
    return copied


def _lengths(train_cfg: Any, accumulative_counts: int) -> tuple[int | None, int]:
    """Return the number of epochs, None if a run counts iterations, and the assumed number of iterations of a run."""
    lengths = train_cfg if isinstance(train_cfg, Mapping) else {}
    max_epochs, max_iters, max_steps = (lengths.get(key) for key in ("max_epochs", "max_iters", "max_steps"))
    if max_iters is not None:
        return max_epochs, max_iters
    if max_steps is not None:
        return max_epochs, max_steps * accumulative_counts
    if max_epochs is None:  # The length of a custom loop is unknown.
        max_epochs = _EPOCH_LENGTH
    return max_epochs, max_epochs * _EPOCH_LENGTH
