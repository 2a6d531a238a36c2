"""Convert BatchNorm layers to SyncBatchNorm and back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.errors import ConfigValueError
from stratagem.model.replaced_layers import copy_hooks
from stratagem.utils.names import did_you_mean

__all__ = ["convert_sync_batchnorm", "require_sync_bn", "revert_sync_batchnorm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _AnyBatchNorm(_BatchNorm):
    """Batch normalization that accepts inputs with any number of dimensions, like SyncBatchNorm."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 -- torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def convert_sync_batchnorm(model: nn.Module, implementation: str = "torch") -> nn.Module:
    """Replace every BatchNorm layer with SyncBatchNorm, which computes its statistics over all ranks.

    Parameters, buffers, hooks and the training mode are preserved. The model is modified in place and returned.

    Raises:
        ConfigValueError: if ``implementation`` is not ``"torch"``.
    """
    require_sync_bn(implementation)
    before = dict(model.named_modules(remove_duplicate=False))
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    after = dict(converted.named_modules(remove_duplicate=False))
    for name, layer in before.items():
        if after[name] is not layer:
            copy_hooks(layer, after[name])
    return converted


def require_sync_bn(implementation: str) -> None:
    """Check the strategy option ``sync_bn``.

    Raises:
        ConfigValueError: if it is not ``"torch"``.
    """
    if implementation != "torch":
        raise ConfigValueError(
            f"Unknown sync_bn={implementation!r}. {did_you_mean(str(implementation), ['torch'])} "
            "Convert layers from other libraries with the functions of those libraries before passing the model to the strategy."
        )


def revert_sync_batchnorm(model: nn.Module) -> tuple[nn.Module, int]:
    """Replace every SyncBatchNorm layer with plain batch normalization; return the model and the number of layers.

    Parameters, buffers, hooks and the training mode are preserved. The model is modified in place unless the model itself is a
    SyncBatchNorm layer.
    """
    plain = {layer: _plain(layer) for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)}
    for parent in list(model.modules()):
        # Do not use named_children(), which omits the second name of a shared layer.
        for name, child in parent._modules.items():
            if isinstance(child, nn.SyncBatchNorm):
                parent._modules[name] = plain[child]
    return plain[model] if isinstance(model, nn.SyncBatchNorm) else model, len(plain)


def _plain(layer: nn.SyncBatchNorm) -> nn.Module:
    plain = _AnyBatchNorm(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
    )
    if layer.affine:
        plain.weight, plain.bias = layer.weight, layer.bias
    plain.running_mean, plain.running_var = layer.running_mean, layer.running_var
    plain.num_batches_tracked = layer.num_batches_tracked
    copy_hooks(layer, plain)
    return plain.train(layer.training)
