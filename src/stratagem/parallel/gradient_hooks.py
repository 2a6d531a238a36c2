"""Report or refuse hooks on the gradients of parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn

from torch import nn

from stratagem.errors import PlacementError
from stratagem.utils import named_parameters
from stratagem.utils.names import some_names
from stratagem.utils.torch_private import gradient_hooks

__all__ = ["GRADIENT_HOOKS", "hooks_of_parameters", "log_gradient_hooks", "refuse_gradient_hooks"]

GRADIENT_HOOKS: Final = ("register_hook", "register_post_accumulate_grad_hook")


def hooks_of_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of the parameters that have hooks on their gradients, each with the methods that registered them."""
    found = {
        name: tuple(method for method, hooks in zip(GRADIENT_HOOKS, gradient_hooks(parameter), strict=True) if hooks)
        for name, parameter in named_parameters(model).items()
    }
    return {name: methods for name, methods in found.items() if methods}


def log_gradient_hooks(names: Sequence[str], logger: logging.Logger) -> None:
    """Log with which gradients hooks are called if each rank computes gradients from its own samples."""
    if names:
        logger.info(
            "The hooks on the gradients of %s are called on each rank with the gradient of its samples, before the mean over "
            "the ranks is computed. Hooks that are not linear, such as clipping, change training compared with one process.",
            some_names(names),
        )  # fmt: skip


def refuse_gradient_hooks(parameters: Mapping[str, nn.Parameter], methods: Sequence[str], instead: str) -> None:
    """Make some methods that register hooks raise an error for these parameters.

    Args:
        parameters: the parameters by name.
        methods: the names of the methods.
        instead: why hooks are not supported, and what to do.
    """
    for name, parameter in parameters.items():
        for method in methods:
            # As an attribute of this parameter, which takes precedence over the method of its class.
            vars(parameter)[method] = partial(_refuse, method, name, instead)


def _refuse(method: str, name: str, instead: str, *_: Any, **__: Any) -> NoReturn:
    raise PlacementError(f"{method} was called on {name}. {instead}")
