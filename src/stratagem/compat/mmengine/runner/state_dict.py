"""Get and load the weights of a model whose modules may be wrapped."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from stratagem.compat.mmengine.dist import get_dist_info
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.model.wrappers import is_model_wrapper
from stratagem.compat.mmengine.utils import apply_to
from stratagem.errors import CheckpointMismatchError

__all__ = ["get_state_dict", "load_state_dict", "weights_to_cpu"]


class _IncompatibleKeys(NamedTuple):
    """The keys of a state dict that do not match the model, in the form that torch's hooks expect."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "module", None)
    wraps = is_model_wrapper(module) or any(kind.__name__ == "BaseTTAModel" for kind in type(module).__mro__)
    return inner if wraps and isinstance(inner, nn.Module) else module


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = False, logger: Any = None) -> None:
    """Load weights into a model. Differences are logged, including those in shape; wrappers inside the model are skipped.

    Args:
        module: the model.
        state_dict: the weights by name.
        strict: whether a difference is an error.
        logger: a logger, its name, or None to print.

    Raises:
        RuntimeError: if ``strict`` and the keys or shapes differ.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    versions = getattr(state_dict, "_metadata", None) or {}
    given = OrderedDict(state_dict)

    def load(target: nn.Module, own: Mapping[str, Any], prefix: str) -> None:
        target = _unwrapped(target)
        target._load_from_state_dict(own, prefix, versions.get(prefix[:-1], {}), True, missing, unexpected, errors)
        for name, child in target._modules.items():
            if child is not None:
                below = f"{prefix}{name}."
                load(child, {key: value for key, value in own.items() if key.startswith(below)}, below)
        keys = _IncompatibleKeys(missing, unexpected)
        for hook in target._load_state_dict_post_hooks.values():
            if hook(target, keys) is not None:
                raise AssertionError(
                    f"A load_state_dict post-hook of {type(target).__name__} returned a value. Change the keys in place instead."
                )

    load(module, given, "")
    # Checkpoints from before torch 0.4.1 have no counters.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if unexpected:
        errors.append(f"unexpected key in source state_dict: {', '.join(unexpected)}")
    if missing:
        errors.append(f"missing keys in source state_dict: {', '.join(missing)}")
    if not errors or get_dist_info()[0] != 0:
        return
    message = "\n".join(["The model and loaded state dict do not match exactly", *errors])
    if strict:
        raise CheckpointMismatchError(message)
    print_log(message, logger=logger, level=logging.WARNING)


def weights_to_cpu(state_dict: Any) -> Any:
    """Return a copy of a state dict with all tensors on the CPU, including the versions of modules."""
    versions = getattr(state_dict, "_metadata", OrderedDict())
    moved = apply_to(state_dict, lambda value: hasattr(value, "cpu"), lambda value: value.cpu())
    moved._metadata = versions
    return moved


def get_state_dict(
    module: nn.Module, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> OrderedDict[str, Any]:
    """Return the parameters and persistent buffers of a model by name, without the names of wrappers inside it.

    Args:
        module: the model.
        destination: the dict to extend; a new one by default.
        prefix: the prefix of the names.
        keep_vars: whether tensors keep their connection to autograd.
    """
    module = _unwrapped(module)
    if destination is None:
        destination = OrderedDict()
        destination._metadata = OrderedDict()
    versions = {"version": module._version}
    destination._metadata[prefix[:-1]] = versions
    module._save_to_state_dict(destination, prefix, keep_vars)
    for name, child in module._modules.items():
        if child is not None:
            get_state_dict(child, destination, f"{prefix}{name}.", keep_vars=keep_vars)
    for hook in module._state_dict_hooks.values():
        replaced = hook(module, destination, prefix, versions)
        destination = destination if replaced is None else replaced
    return destination  # type: ignore[no-any-return]
