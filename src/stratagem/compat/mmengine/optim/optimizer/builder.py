"""Registering optimizers, and building optimizer wrappers from configurations."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from stratagem.compat.mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS

__all__ = ["OPTIMIZERS", "OPTIM_WRAPPER_CONSTRUCTORS", "build_optim_wrapper"]


def _optimizers_of(module: ModuleType) -> dict[str, type[Optimizer]]:
    found = inspect.getmembers(module, lambda each: inspect.isclass(each) and issubclass(each, Optimizer))
    return {name: each for name, each in found if not name.startswith("__")}


def _register(optimizers: Iterable[tuple[str, type[Optimizer]]]) -> list[str]:
    names = []
    for name, optimizer in optimizers:
        OPTIMIZERS.register_module(name=name, module=optimizer)
        names.append(name)
    return names


def _register_from(package: str, *names: str) -> list[str]:
    """Register optimizers of a package if it is installed: all of them, or those with the given names."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        return []
    found = _optimizers_of(module)
    return _register((name, found[name]) for name in names or found if name in found)


def register_torch_optimizers() -> list[str]:
    """Register torch's optimizers, and return their names. Its Adafactor is registered as ``TorchAdafactor``."""
    found = _optimizers_of(torch.optim)
    _register(("TorchAdafactor" if name == "Adafactor" else name, each) for name, each in found.items())
    return list(found)


def register_bitsandbytes_optimizers() -> list[str]:
    """Register the optimizers of bitsandbytes if it is installed, with the prefix ``bnb_`` if a name is already used."""
    try:
        module = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        return []
    found = _optimizers_of(module)
    return _register((f"bnb_{name}" if name in OPTIMIZERS else name, each) for name, each in found.items())


TORCH_OPTIMIZERS = register_torch_optimizers()
DADAPTATION_OPTIMIZERS = _register_from("dadaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptSGD")
LION_OPTIMIZERS = _register_from("lion_pytorch", "Lion")
SOPHIA_OPTIMIZERS = _register_from("Sophia")
BITSANDBYTES_OPTIMIZERS = register_bitsandbytes_optimizers()
TRANSFORMERS_OPTIMIZERS = _register_from("transformers", "Adafactor")


def build_optim_wrapper(model: nn.Module, cfg: Any) -> OptimWrapper:
    """Build an optimizer wrapper for a model.

    Args:
        model: the model whose parameters are optimized.
        cfg: the configuration of the wrapper, with that of the optimizer under ``optimizer``. ``constructor`` is the name of
            a constructor, by default ``DefaultOptimWrapperConstructor``, and ``paramwise_cfg`` its rules for parameters.
    """
    options = copy.deepcopy(cfg)
    constructor = {
        "type": options.pop("constructor", "DefaultOptimWrapperConstructor"),
        "paramwise_cfg": options.pop("paramwise_cfg", None),
        "optim_wrapper_cfg": options,
    }
    built: OptimWrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(constructor)(model)
    return built
