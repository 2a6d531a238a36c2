"""Recognizing modules that wrap a model."""

from __future__ import annotations

from torch import nn

from stratagem.compat.mmengine.registry import MODEL_WRAPPERS, Registry

__all__ = ["is_model_wrapper"]


def is_model_wrapper(model: nn.Module, registry: Registry = MODEL_WRAPPERS) -> bool:
    """Return whether the class of a module is registered in a registry or in one of its children."""
    if isinstance(model, tuple(registry.module_dict.values())):
        return True
    return any(is_model_wrapper(model, child) for child in registry.children.values())
