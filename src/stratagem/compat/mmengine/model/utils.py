"""Functions for batches and modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F  # noqa: N812 -- torch's convention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.utils.dl_utils import mmcv_full_available
from stratagem.errors import ConfigValueError
from stratagem.model import norms
from stratagem.utils.imports import import_object

__all__ = [
    "convert_sync_batchnorm",
    "detect_anomalous_params",
    "merge_dict",
    "revert_sync_batchnorm",
    "stack_batch",
]


def stack_batch(tensor_list: Sequence[Tensor], pad_size_divisor: int = 1, pad_value: float = 0) -> Tensor:
    """Stack tensors, padded at the end of each dimension except the first to the same size.

    Args:
        tensor_list: tensors with the same number of dimensions.
        pad_size_divisor: the sizes of the padded dimensions are multiples of this number.
        pad_value: the value of the padding.

    Returns:
        A tensor with one more dimension at the beginning.
    """
    require(isinstance(tensor_list, list), f"tensor_list must be a list of tensors, got {type(tensor_list).__name__}.")
    require(tensor_list, "tensor_list is empty.")
    dims = {tensor.ndim for tensor in tensor_list}
    if len(dims) != 1:
        raise InvalidArgumentError(f"The tensors must have the same number of dimensions, got {sorted(dims)}.")
    sizes = [tensor.shape[1:] for tensor in tensor_list]
    padded = [math.ceil(max(each) / pad_size_divisor) * pad_size_divisor for each in zip(*sizes, strict=True)]
    return torch.stack([_pad(tensor, padded, pad_value) for tensor in tensor_list])


def _pad(tensor: Tensor, sizes: Sequence[int], value: float) -> Tensor:
    missing = [target - size for target, size in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    # torch lists the last dimension first, with the padding before and after it.
    return F.pad(tensor, [amount for each in reversed(missing) for amount in (0, each)], value=value)


def detect_anomalous_params(loss: Tensor, model: nn.Module) -> None:
    """Log an error for each trainable parameter on which the loss does not depend.

    Args:
        loss: the loss, before its graph is freed.
        model: the model.
    """
    reached: set[Tensor] = set()
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        pending.extend(parent for parent, _ in node.next_functions)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in reached:
            print_log(
                f"{name} with shape {tuple(parameter.shape)} is not in the graph of the loss.",
                logger="current",
                level=logging.ERROR,
            )


@torch.fx.wrap
def merge_dict(*args: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict with the items of all arguments; later ones take precedence. ``torch.fx`` does not trace into it."""
    merged: dict[Any, Any] = {}
    for each in args:
        if not isinstance(each, dict):
            raise InvalidArgumentError(f"merge_dict accepts only dicts, got {each!r}.")
        merged.update(each)
    return merged


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every SyncBatchNorm layer, including those of mmcv, with plain batch normalization, and return the module."""
    if mmcv_full_available():
        module = _replace(module, import_object("mmcv.ops:SyncBatchNorm"), nn.SyncBatchNorm)
    return norms.revert_sync_batchnorm(module)[0]


def convert_sync_batchnorm(module: nn.Module, implementation: str = "torch") -> nn.Module:
    """Replace every BatchNorm layer with SyncBatchNorm, and return the module.

    Args:
        module: the module.
        implementation: ``"torch"`` or ``"mmcv"``.

    Raises:
        ConfigValueError: for another implementation.
    """
    if implementation == "torch":
        return norms.convert_sync_batchnorm(module)
    if implementation != "mmcv":
        raise ConfigValueError(f'sync_bn must be "torch" or "mmcv", got {implementation!r}.')
    return _replace(module, _BatchNorm, import_object("mmcv.ops:SyncBatchNorm"))


def _replace(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
    """Replace the normalization layers of one class with those of another that has the same arguments and state."""
    for name, child in module.named_children():
        setattr(module, name, _replace(child, old, new))
    if not isinstance(module, old):
        return module
    layer: Any = module
    built = new(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "qconfig"):
        if hasattr(layer, name):
            setattr(built, name, getattr(layer, name))
    return built.train(module.training)
