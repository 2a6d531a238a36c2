"""Functions on layers and images."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from stratagem.compat.mmengine.utils.misc import is_tuple_of
from stratagem.errors import ConfigTypeError

__all__ = ["has_batch_norm", "is_norm", "mmcv_full_available", "tensor2imgs"]

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def is_norm(layer: nn.Module, exclude: type | tuple[type, ...] | None = None) -> bool:
    """Return whether a layer is a normalization layer: batch, instance, group or layer normalization.

    Args:
        layer: the layer.
        exclude: classes whose layers do not count.

    Raises:
        TypeError: if ``exclude`` is not a class or a tuple of classes.
    """
    excluded = exclude if isinstance(exclude, tuple) else () if exclude is None else (exclude,)
    if not is_tuple_of(excluded, type):
        raise ConfigTypeError(f'"exclude" must be either None or type or a tuple of types, got {exclude!r}.')
    return isinstance(layer, _NORMS) and not isinstance(layer, excluded)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model contains batch normalization."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def tensor2imgs(
    tensor: Tensor,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    to_bgr: bool = True,
) -> list[npt.NDArray[Any]]:
    """Return the images of a normalized batch, as arrays of shape (height, width, channels).

    Args:
        tensor: a batch of shape (N, C, height, width) with 3 channels in the order RGB, or 1.
        mean: what was subtracted from each channel; 0 by default.
        std: what each channel was divided by; 1 by default.
        to_bgr: whether to return the channels in the order BGR. Must be False for images with 1 channel.

    Raises:
        AssertionError: if the shape or the number of values does not fit.
    """
    require(
        isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.shape[1] in (1, 3),
        f"The images must be a tensor of shape (N, 1 or 3, height, width), got {getattr(tensor, 'shape', tensor)!r}.",
    )
    channels = tensor.shape[1]
    mean, std = mean or (0.0,) * channels, std or (1.0,) * channels
    require(
        len(mean) == len(std) == channels,
        f"The images have {channels} channels, but mean has {len(mean)} values, and std has {len(std)}.",
    )
    require(channels == 3 or not to_bgr, "Images with 1 channel have no order of channels. Pass to_bgr=False.")
    images = tensor.permute(0, 2, 3, 1) * tensor.new_tensor(std) + tensor.new_tensor(mean)
    arrays = images.detach().cpu().numpy()
    return [np.ascontiguousarray(image[..., ::-1] if to_bgr else image) for image in arrays]


def mmcv_full_available() -> bool:
    """Return whether mmcv with its compiled operators is installed."""
    try:
        return importlib.util.find_spec("mmcv._ext") is not None
    except ImportError:
        return False
