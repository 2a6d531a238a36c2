"""From a configuration or an object to the object. Plain functions: no strategy in sight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapper, OptimWrapperDict, ParamScheduler
from stratagem.optim import build_optim_wrapper as construct_optim_wrapper
from stratagem.parallel import AnyOptim
from stratagem.registry import MODELS, OPTIM_WRAPPERS
from stratagem.utils import refuse_unknown
from stratagem.utils.data_names import data_keys
from stratagem.utils.data_rules import refuse_data_arguments

__all__ = [
    "ScalingRule",
    "build_model",
    "build_optim_wrapper",
    "compile_model",
    "is_scheduled",
    "load_schedulers",
    "scale_lr",
    "with_preprocessor",
]

ScalingRule = Literal["linear", "sqrt"]

_COMPILE_OPTIONS = ("target", *(name for name in inspect.signature(torch.compile).parameters if name != "model"))


def build_model(model: nn.Module | Mapping[str, Any]) -> nn.Module:
    """Return a module as it is; build a mapping through ``MODELS``.

    Raises:
        ConfigTypeError: for anything else.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, Mapping):
        raise ConfigTypeError(f"A model is a torch.nn.Module or a mapping with its type, not {_shown(model)}.")
    built = MODELS.build(model)
    if not isinstance(built, nn.Module):
        raise ConfigTypeError(f"model: type={model.get('type')!r} made {_shown(built)}, which is no torch.nn.Module.")
    return built


def with_preprocessor(model: Any, data_preprocessor: Any) -> Any:
    """Return the model's configuration with the preprocessor in it, where one is given and the model has none.

    Raises:
        ConfigValueError: if the model is built already, so that the preprocessor would be ignored.
    """
    if data_preprocessor is None:
        return model
    if not isinstance(model, Mapping):
        raise ConfigValueError(
            "data_preprocessor goes into the model's configuration, but the model is built already: give it to the model."
        )
    return {"data_preprocessor": data_preprocessor, **model}


def compile_model(model: nn.Module, compile: bool | Mapping[str, Any]) -> bool:  # noqa: A002 -- the contract's name
    """Replace a method of ``model`` by its compiled form, in place; tell whether that was asked for.

    Args:
        model: what is compiled.
        compile: True compiles ``forward``; a mapping holds the arguments of ``torch.compile`` and, as ``target``, the
            method's name. A data file may give only those that start no program of its choice.

    Raises:
        ConfigTypeError: if ``compile`` is neither.
        ConfigKeyError: if ``torch.compile`` has no such argument.
        ConfigValueError: if the model has no such method, or a data file gave an argument that it must not give.
    """
    if isinstance(compile, bool):
        options: dict[str, Any] = {}
        if not compile:
            return False
    elif isinstance(compile, Mapping):
        options = dict(compile)
    else:
        raise ConfigTypeError(
            f"compile is {_shown(compile)}; True, False or a mapping of torch.compile's arguments is due."
        )
    refuse_unknown(options, _COMPILE_OPTIONS, "compile")
    refuse_data_arguments(torch.compile, options, "compile: ")
    if options.get("disable", False):
        return False
    by_data = "target" in data_keys(options)
    target = options.pop("target", "forward")
    method = getattr(model, target, None)
    if not (inspect.ismethod(method) if by_data else callable(method)):
        raise ConfigValueError(f"compile: target={target!r}, but {type(model).__name__} has no such method.")
    setattr(model, str(target), torch.compile(method, **options))
    return True


def build_optim_wrapper(
    optim: Optimizer | BaseOptimWrapper | OptimWrapperDict | Mapping[str, Any], model: nn.Module | None = None
) -> AnyOptim:
    """Return a wrapper (or several, by name) from whatever stands for it.

    A built wrapper is returned as it is. A bare optimizer is wrapped. A mapping with a built ``optimizer`` makes the
    wrapper that ``type`` names (``OptimWrapper`` by default); one with an ``optimizer`` mapping or a ``constructor``
    goes to the constructor, which needs ``model``; one from names to built wrappers becomes an ``OptimWrapperDict``.

    Raises:
        ConfigTypeError: for anything else.
        ConfigValueError: if an item of several wrappers is not a built wrapper, or the model that is needed is missing.
    """
    if isinstance(optim, BaseOptimWrapper | OptimWrapperDict):
        return optim
    if isinstance(optim, Optimizer):
        return OptimWrapper(optim)
    if not isinstance(optim, Mapping):
        raise ConfigTypeError(
            f"An optimizer wrapper is a built one, a torch.optim.Optimizer or a mapping, not {_shown(optim)}."
        )
    if isinstance(optim.get("optimizer"), Optimizer):
        return _wrapper(OPTIM_WRAPPERS.build(optim, default_args={"type": "OptimWrapper"}))
    if "optimizer" in optim or "constructor" in optim:
        if model is None:
            raise ConfigValueError("build_optim_wrapper needs the model whose parameters the optimizer shall step.")
        return construct_optim_wrapper(model, optim)
    if not optim:
        raise ConfigValueError(
            "optim_wrapper is an empty mapping; it needs an optimizer: dict(optimizer=dict(type='SGD', lr=0.1))."
        )
    for name, wrapper in optim.items():
        if not isinstance(wrapper, BaseOptimWrapper):
            raise ConfigValueError(
                f"optim_wrapper: without an optimizer, each item must be a built optimizer wrapper, but {name}={_shown(wrapper)}."
            )
    return OptimWrapperDict(**optim)


def _wrapper(built: Any) -> AnyOptim:
    if not isinstance(built, BaseOptimWrapper | OptimWrapperDict):
        raise ConfigTypeError(f"optim_wrapper: its type made {_shown(built)}, which is no optimizer wrapper.")
    return built


def is_scheduled(wrapper: BaseOptimWrapper) -> bool:
    """Tell whether a schedule of the learning rate was built for this optimizer: it keeps the first value."""
    return any("initial_lr" in group for group in wrapper.param_groups)


def scale_lr(wrapper: BaseOptimWrapper, *, base_batch: int, real_batch: int, rule: ScalingRule = "linear") -> float:
    """Multiply every learning rate as the batch has grown, and return the factor.

    ``"linear"`` is ``real_batch / base_batch``, the rule of Goyal et al. 2017, "Accurate, Large Minibatch SGD"
    (arXiv:1706.02677), section 2.1. ``"sqrt"`` is its square root: the rule of Krizhevsky 2014 (arXiv:1404.5997),
    section 5, which fits Adam and its like (Malladi et al. 2022, arXiv:2205.10287).
    """
    factor = real_batch / base_batch
    if rule == "sqrt":
        factor = math.sqrt(factor)
    for group in wrapper.param_groups:
        group["lr"] = group["lr"] * factor
    return factor


def _shown(value: object, most: int = 120) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= most else text[:most] + '...'}"


def load_schedulers(
    schedulers: list[ParamScheduler] | dict[str, list[ParamScheduler]],
    states: Any,
) -> None:
    """Load the schedulers' states, one for one.

    Raises:
        CheckpointMismatchError: if there are more or fewer than schedulers, or they belong to other optimizers.
    """
    if isinstance(schedulers, dict) != isinstance(states, Mapping):
        here, there = ("several", "one") if isinstance(schedulers, dict) else ("one", "several")
        raise CheckpointMismatchError(
            f"The checkpoint's schedulers belong to {there} optimizer(s), this run's to {here}."
        )
    if isinstance(schedulers, dict):
        if set(schedulers) != set(states):
            raise CheckpointMismatchError(
                f"The checkpoint has schedulers for {sorted(states)}, this run for {sorted(schedulers)}."
            )
        for name, some in schedulers.items():
            load_schedulers(some, states[name])
        return
    if len(schedulers) != len(states):
        raise CheckpointMismatchError(
            f"The checkpoint has {len(states)} schedulers, this run has {len(schedulers)}. Build the same ones, or resume "
            "with resume_param_scheduler=False."
        )
    for scheduler, state in zip(schedulers, states, strict=True):
        scheduler.load_state_dict(state)
