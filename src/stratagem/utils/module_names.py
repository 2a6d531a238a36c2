"""Name parameters and modules without the wrappers that torch puts inside a model.

``model.network = torch.compile(model.network)`` adds ``_orig_mod`` to every name below ``network``, and torch's wrapper for
activation checkpointing adds ``_checkpoint_wrapped_module``. Checkpoints use the names without them, so that a run resumes
whether or not a part of the model is wrapped. Only real wrappers are removed; a module may itself have such an attribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stratagem.utils.torch_private import inner_wrappers

__all__ = ["canonical_names", "named_buffers", "named_parameters", "unwrap_data_parallel", "with_canonical_keys"]


def canonical_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function that removes wrappers inside the model from the name of a parameter, buffer or module."""
    # (name of the module without wrappers, attribute of the wrapper) -> number of wrappers around that module
    wrappers: Counter[tuple[str, str]] = Counter()
    classes = inner_wrappers()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        prefix, module = stack.pop()
        attribute = next((name for cls, name in classes.items() if isinstance(module, cls)), None)
        if attribute is not None:
            wrappers[prefix, attribute] += 1
        for name, child in module._modules.items():
            if child is not None:
                stack.append((prefix if name == attribute else _below(prefix, name), child))
    return (lambda name: _without(name, wrappers)) if wrappers else (lambda name: name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return ``dict(model.named_parameters())`` with the names that checkpoints use."""
    canonical = canonical_names(model)
    return {canonical(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return ``dict(model.named_buffers())`` with the names that checkpoints use."""
    canonical = canonical_names(model)
    return {canonical(name): buffer for name, buffer in model.named_buffers()}


def unwrap_data_parallel(model: nn.Module) -> nn.Module:
    """Return the module inside DDP or DataParallel; any other model is returned as is, even if it has an attribute ``module``."""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model


def with_canonical_keys(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model under the names that checkpoints use; unchanged if nothing in it is wrapped."""
    canonical = canonical_names(model)
    if all(canonical(key) == key for key in state):
        return state
    renamed = type(state)((canonical(key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        renamed._metadata = {canonical(module): version for module, version in versions.items()}  # type: ignore[attr-defined]
    return renamed


def _without(name: str, wrappers: Mapping[tuple[str, str], int]) -> str:
    kept = ""
    removed: Counter[str] = Counter()
    for part in name.split("."):
        # A wrapper may be wrapped again; the same attribute of the innermost module remains.
        if removed[part] < wrappers.get((kept, part), 0):
            removed[part] += 1
        else:
            kept = _below(kept, part)
            removed.clear()
    return kept


def _below(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
