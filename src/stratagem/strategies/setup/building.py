"""Build models and optimizer wrappers from configurations, and compile models. These functions do not require a strategy."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapper, OptimWrapperDict, ParamScheduler
from stratagem.optim import build_optim_wrapper as construct_optim_wrapper
from stratagem.optim.mixed import MixedOptimizer
from stratagem.optim.schedules.chain import scale_option
from stratagem.parallel import AnyOptim
from stratagem.registry import MODELS, OPTIM_WRAPPERS
from stratagem.utils import refuse_unknown
from stratagem.utils.data_names import data_keys
from stratagem.utils.data_rules import refuse_data_arguments

__all__ = [
    "ScalingRule",
    "build_model",
    "build_optim_wrapper",
    "check_compile",
    "check_model",
    "compile_model",
    "is_scheduled",
    "load_schedulers",
    "parse_compile",
    "require_optimizer",
    "scale_lr",
    "with_preprocessor",
]

ScalingRule = Literal["linear", "sqrt"]

_COMPILE_OPTIONS = ("target", *(name for name in inspect.signature(torch.compile).parameters if name != "model"))


def build_model(model: nn.Module | Mapping[str, Any]) -> nn.Module:
    """Return a module unchanged; build a mapping through ``MODELS``.

    Raises:
        ConfigTypeError: if ``model`` is neither a module nor a mapping, or its ``type`` builds something other than a module.
    """
    if isinstance(model, nn.Module):
        return model
    check_model(model)
    built = MODELS.build(model)
    if not isinstance(built, nn.Module):
        raise ConfigTypeError(
            f"model: type={model.get('type')!r} builds {_shown(built)}, which is not a torch.nn.Module."
        )
    return built


def check_model(model: Any, data_preprocessor: Any = None) -> None:
    """Check that ``model`` is a module or a configuration, without building it.

    Raises:
        ConfigTypeError: if it is neither.
        ConfigValueError: if the model is already built and the preprocessor would therefore be ignored.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise ConfigTypeError(f"model must be a torch.nn.Module or a mapping with its type, got {_shown(model)}.")
    with_preprocessor(model, data_preprocessor)


def require_optimizer(param_scheduler: Any, optim_wrapper: Any) -> None:
    """Require an optimizer wrapper if there are parameter schedulers.

    Raises:
        ConfigValueError: if it is missing.
    """
    if param_scheduler is not None and optim_wrapper is None:
        raise ConfigValueError(
            "param_scheduler was specified without optim_wrapper. Specify both, or omit param_scheduler."
        )


def with_preprocessor(model: Any, data_preprocessor: Any) -> Any:
    """Return the configuration of a model with ``data_preprocessor`` added, unless it is None or the model has one.

    Raises:
        ConfigValueError: if the model is already built and the preprocessor would therefore be ignored.
    """
    if data_preprocessor is None:
        return model
    if not isinstance(model, Mapping):
        raise ConfigValueError(
            "data_preprocessor cannot be added to a model that is already built. Pass it to the constructor of the "
            "model."
        )
    return {"data_preprocessor": data_preprocessor, **model}


def compile_model(model: nn.Module, compile: bool | Mapping[str, Any]) -> bool:  # noqa: A002 -- the public name
    """Compile a method of ``model`` in place if ``compile`` enables it. Return whether it was compiled.

    Args:
        model: the model.
        compile: True compiles ``forward``; a mapping contains arguments of ``torch.compile`` and, as ``target``, the name
            of the method. Arguments that could run arbitrary code are rejected if they come from a data file.

    Raises:
        ConfigTypeError: if ``compile`` is neither a bool nor a mapping.
        ConfigKeyError: if ``torch.compile`` has no such argument.
        ConfigValueError: if the model has no such method, or an argument must not come from a data file.
    """
    options = parse_compile(compile)
    if options is None:
        return False
    by_data = "target" in data_keys(options)
    target = options.pop("target", "forward")
    method = getattr(model, target, None)
    if not (inspect.ismethod(method) if by_data else callable(method)):
        raise ConfigValueError(f"compile: target={target!r}, but {type(model).__name__} has no such method.")
    setattr(model, str(target), torch.compile(method, **options))
    return True


def parse_compile(compile: bool | Mapping[str, Any]) -> dict[str, Any] | None:  # noqa: A002 -- the public name
    """Return ``target`` and the arguments of ``torch.compile``, or None if ``compile`` disables compilation.

    Raises:
        ConfigTypeError: if ``compile`` is neither a bool nor a mapping.
        ConfigKeyError: if ``torch.compile`` has no such argument.
        ConfigValueError: if an argument must not come from a data file.
    """
    if isinstance(compile, bool):
        return {} if compile else None
    if not isinstance(compile, Mapping):
        raise ConfigTypeError(
            f"compile must be True, False or a mapping with arguments of torch.compile, got {_shown(compile)}."
        )
    options = dict(compile)
    refuse_unknown(options, _COMPILE_OPTIONS, "compile")
    refuse_data_arguments(torch.compile, options, "compile: ")
    return None if options.get("disable", False) else options


def check_compile(compile: bool | Mapping[str, Any]) -> None:  # noqa: A002 -- the public name
    """Check ``compile`` as :func:`compile_model` does, without a model; ``target`` is not looked up.

    Raises:
        ConfigError: (or a subclass) if ``compile`` is invalid. Exceptions of ``torch.compile`` are not converted.
    """
    options = parse_compile(compile) or {}
    arguments = {name: value for name, value in options.items() if name != "target"}
    if arguments:
        with warnings.catch_warnings():
            # Importing the compiler warns about deprecated parts of torch.
            warnings.simplefilter("ignore")
            torch.compile(_identity, **arguments)  # Nothing is compiled before the first call.


def _identity(value: Any) -> Any:
    return value


def build_optim_wrapper(
    optim: Optimizer | BaseOptimWrapper | OptimWrapperDict | Mapping[str, Any], model: nn.Module | None = None
) -> AnyOptim:
    """Return the optimizer wrapper, or for several optimizers the ``OptimWrapperDict``, that ``optim`` specifies.

    A built wrapper is returned unchanged, and an optimizer is wrapped. A mapping with a built ``optimizer`` builds the
    wrapper of its ``type`` (by default ``OptimWrapper``). A mapping with an ``optimizer`` mapping or a ``constructor`` is
    passed to the constructor, which needs ``model``. A mapping from names to built wrappers becomes an
    ``OptimWrapperDict``.

    Raises:
        ConfigTypeError: if ``optim`` has any other type.
        ConfigValueError: if one of several wrappers is not built, or ``model`` is needed and missing.
    """
    if isinstance(optim, BaseOptimWrapper | OptimWrapperDict):
        return optim
    if isinstance(optim, Optimizer):
        return OptimWrapper(optim)
    if not isinstance(optim, Mapping):
        raise ConfigTypeError(
            f"optim_wrapper must be an optimizer wrapper, a torch.optim.Optimizer or a mapping, got {_shown(optim)}."
        )
    if isinstance(optim.get("optimizer"), Optimizer):
        return _wrapper(OPTIM_WRAPPERS.build(optim, default_args={"type": "OptimWrapper"}))
    if "optimizer" in optim or "constructor" in optim:
        if model is None:
            raise ConfigValueError(
                "build_optim_wrapper requires the model whose parameters are optimized. Pass model=..."
            )
        return construct_optim_wrapper(model, optim)
    if not optim:
        raise ConfigValueError(
            "optim_wrapper is an empty mapping. Specify an optimizer: dict(optimizer=dict(type='SGD', lr=0.1))."
        )
    for name, wrapper in optim.items():
        if not isinstance(wrapper, BaseOptimWrapper):
            raise ConfigValueError(
                f"optim_wrapper: without an optimizer, each item must be a built optimizer wrapper, but {name}={_shown(wrapper)}."
            )
    return OptimWrapperDict(**optim)


def _wrapper(built: Any) -> AnyOptim:
    if not isinstance(built, BaseOptimWrapper | OptimWrapperDict):
        raise ConfigTypeError(f"optim_wrapper: its type builds {_shown(built)}, which is not an optimizer wrapper.")
    return built


def is_scheduled(wrapper: BaseOptimWrapper) -> bool:
    """Return whether a learning-rate schedule, which stores the initial learning rates, was already built for this optimizer."""
    return any("initial_lr" in group for group in wrapper.param_groups)


def scale_lr(wrapper: BaseOptimWrapper, *, base_batch: int, real_batch: int, rule: ScalingRule = "linear") -> float:
    """Multiply every learning rate by a factor that depends on the batch size, and return the factor.

    With ``"linear"`` the factor is ``real_batch / base_batch``, the rule of Goyal et al. 2017, "Accurate, Large Minibatch
    SGD" (arXiv:1706.02677), section 2.1. With ``"sqrt"`` it is the square root of this ratio, the rule of Krizhevsky 2014
    (arXiv:1404.5997), section 5, which suits adaptive optimizers such as Adam (Malladi et al. 2022, arXiv:2205.10287).
    """
    factor = real_batch / base_batch
    if rule == "sqrt":
        factor = math.sqrt(factor)
    if isinstance(wrapper.optimizer, MixedOptimizer):
        for part in wrapper.optimizer.parts.values():
            scale_option(part, part.param_groups, "lr", factor)
    else:
        scale_option(wrapper.optimizer, wrapper.param_groups, "lr", factor)
    return factor


def _shown(value: object, most: int = 120) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= most else text[:most] + '...'}"


def load_schedulers(
    schedulers: list[ParamScheduler] | dict[str, list[ParamScheduler]],
    states: Any,
) -> None:
    """Load one state into each scheduler.

    Raises:
        CheckpointMismatchError: if the number of states differs from the number of schedulers, or the states belong to
            different optimizers.
    """
    if isinstance(schedulers, dict) != isinstance(states, Mapping):
        here, there = ("several", "one") if isinstance(schedulers, dict) else ("one", "several")
        raise CheckpointMismatchError(
            f"The schedulers in the checkpoint belong to {there} optimizer(s), but the schedulers of this run belong "
            f"to {here}."
        )
    if isinstance(schedulers, dict):
        if set(schedulers) != set(states):
            raise CheckpointMismatchError(
                f"The checkpoint has schedulers for {sorted(states)}, but this run has schedulers for {sorted(schedulers)}."
            )
        for name, some in schedulers.items():
            load_schedulers(some, states[name])
        return
    if len(schedulers) != len(states):
        raise CheckpointMismatchError(
            f"The checkpoint has {len(states)} schedulers, but this run has {len(schedulers)}. Configure the same schedulers, "
            "or resume with resume_param_scheduler=False."
        )
    for scheduler, state in zip(schedulers, states, strict=True):
        scheduler.load_state_dict(state)
