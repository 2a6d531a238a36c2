"""Compute the activations of modules again in the backward pass instead of storing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["turn_on_activation_checkpointing", "wrap_forward"]


def wrap_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``forward`` and stores only its inputs for the backward pass."""

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return recomputed


def turn_on_activation_checkpointing(model: nn.Module, modules: Sequence[str] | str) -> None:
    """Replace the ``forward`` of some modules by one that computes the activations again in the backward pass.

    Args:
        model: the model.
        modules: the name of a module, such as ``"backbone.layer1"``, or a list of names.

    Raises:
        AttributeError: if a module does not exist.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        module = model.get_submodule(name)
        module.forward = wrap_forward(module.forward)
