"""What a layer loses if another layer replaces it: its hooks and its parametrizations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["copy_hooks", "has_hooks", "lost_by_replacement", "weight_computation"]

# The torch.nn.Module attributes that contain hooks around the forward and the backward pass, and the options of these hooks.
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# The hooks of the deprecated functions torch.nn.utils.weight_norm and spectral_norm.
_WEIGHT_HOOKS: Final = ("WeightNorm", "SpectralNorm")


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks are registered around the forward or the backward pass of a module."""
    return any(getattr(module, name, None) for name in _HOOKS)


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register the hooks of ``source`` on ``target``, which has the same inputs and outputs."""
    for name in _HOOKS:
        getattr(target, name).update(getattr(source, name))
    if target._is_full_backward_hook is None:
        target._is_full_backward_hook = source._is_full_backward_hook


def weight_computation(module: nn.Module) -> str | None:
    """Return how a module computes its weight from other parameters, such as ``"weight_norm"``; None for a plain weight."""
    if is_parametrized(module):
        return ", ".join(sorted({type(each).__name__ for part in module.parametrizations.values() for each in part}))  # type: ignore[operator]
    names = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    return next((name for name in names if name in _WEIGHT_HOOKS), None)


def lost_by_replacement(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return a mapping from the names of replaced layers to what each of them lost: its hooks or its weight computation.

    Args:
        before: a mapping from names to modules before the replacement.
        after: a mapping from names to modules after the replacement.
    """
    lost = {}
    for name, module in before.items():
        if after.get(name) is module:
            continue
        computation = weight_computation(module)
        if computation is not None:
            lost[name] = computation
        elif has_hooks(module):
            lost[name] = "hooks"
    return lost
