"""Modules that move batches to the model's device and prepare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's convention
from torch import Tensor

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.model.utils import stack_batch
from stratagem.compat.mmengine.registry import MODELS
from stratagem.compat.mmengine.structures import BaseDataElement
from stratagem.compat.mmengine.utils import is_seq_of
from stratagem.errors import ConfigTypeError
from stratagem.model.preprocess import BaseDataPreprocessor as _Preprocessor

__all__ = ["BaseDataPreprocessor", "ImgDataPreprocessor"]

_MOVABLE = (Tensor, BaseDataElement)


@MODELS.register_module()
class BaseDataPreprocessor(_Preprocessor):
    """Move batches to the model's device.

    Args:
        non_blocking: whether copies may run asynchronously.
    """

    def __init__(self, non_blocking: bool | None = False) -> None:
        super().__init__(non_blocking=non_blocking)

    @property
    def _device(self) -> torch.device:
        return self.device

    @_device.setter
    def _device(self, device: torch.device) -> None:
        self.device = device

    @property
    def _non_blocking(self) -> bool:
        return bool(self.non_blocking)

    def cast_data(self, data: Any) -> Any:
        """Return a copy of nested mappings and sequences in which tensors and data elements are on the model's device."""
        if isinstance(data, _MOVABLE):  # The most common types first; Mapping and Sequence take much longer.
            return data.to(self.device, non_blocking=self._non_blocking)
        if isinstance(data, Mapping):
            return {key: self.cast_data(value) for key, value in data.items()}
        if data is None or isinstance(data, str | bytes):
            return data
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*map(self.cast_data, data))
        if isinstance(data, Sequence):
            return type(data)(map(self.cast_data, data))  # type: ignore[call-arg]
        return data

    def forward(self, data: Any, training: bool = False) -> Any:
        """Return ``data`` on the model's device. ``training`` specifies whether this is a training step."""
        return self.cast_data(data)


@MODELS.register_module()
class ImgDataPreprocessor(BaseDataPreprocessor):
    """Move batches of images to the model's device; normalize and pad them, and stack them if they are in a list.

    Args:
        mean: the mean to subtract from each channel, or a single one; None to skip normalization.
        std: the divisor of each channel, or a single one.
        pad_size_divisor: the padded height and width are multiples of this number.
        pad_value: the value of the padding, after normalization.
        bgr_to_rgb: whether to reverse three channels, from BGR to RGB.
        rgb_to_bgr: whether to reverse three channels, from RGB to BGR.
        non_blocking: whether copies may run asynchronously.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad_size_divisor: int = 1,
        pad_value: float = 0,
        bgr_to_rgb: bool = False,
        rgb_to_bgr: bool = False,
        non_blocking: bool | None = False,
    ) -> None:
        super().__init__(non_blocking)
        for option, value in (("bgr_to_rgb", bgr_to_rgb), ("rgb_to_bgr", rgb_to_bgr)):
            if not isinstance(value, bool):
                raise ConfigTypeError(f"{option} must be a bool, got {value!r}.")
        require(not (bgr_to_rgb and rgb_to_bgr), "bgr_to_rgb and rgb_to_bgr are both True; set one of them.")
        require((mean is None) == (std is None), f"Set both mean and std, or neither; got mean={mean}, std={std}.")
        self._enable_normalize = mean is not None
        if mean is not None and std is not None:
            for name, values in (("mean", mean), ("std", std)):
                require(len(values) in (1, 3), f"{name} must have 1 or 3 values, got {len(values)}.")
                self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self._channel_conversion = bgr_to_rgb or rgb_to_bgr
        self.pad_size_divisor = pad_size_divisor
        self.pad_value = pad_value

    def forward(self, data: Any, training: bool = False) -> Any:
        """Return the batch with ``inputs`` as one tensor of shape ``[N, C, H, W]``, and ``data_samples``, by default None.

        Args:
            data: a dict whose ``inputs`` are a list of ``[C, H, W]`` tensors, or a tensor of shape ``[N, C, H, W]``.
            training: whether this is a training step.

        Raises:
            ConfigTypeError: if the inputs are something else.
        """
        batch = self.cast_data(data)
        inputs = batch["inputs"]
        if is_seq_of(inputs, Tensor):
            images = [self._normalized(image) for image in inputs]
            batch["inputs"] = stack_batch(images, self.pad_size_divisor, self.pad_value)
        elif isinstance(inputs, Tensor):
            require(inputs.dim() == 4, f"inputs must have the shape [N, C, H, W], got {tuple(inputs.shape)}.")
            missing = [math.ceil(n / self.pad_size_divisor) * self.pad_size_divisor - n for n in inputs.shape[2:]]
            padding = [0, missing[1], 0, missing[0]]
            batch["inputs"] = F.pad(self._normalized(inputs), padding, "constant", self.pad_value)
        else:
            raise ConfigTypeError(f"inputs must be a tensor or a list of tensors, got {type(inputs).__name__}.")
        batch.setdefault("data_samples", None)
        return batch

    def _normalized(self, images: Tensor) -> Tensor:
        """Return one image or a batch with reversed channels and normalized, if configured, in float."""
        if self._channel_conversion:
            images = images[..., [2, 1, 0], :, :]
        images = images.float()
        if self._enable_normalize:
            require(
                images.dim() == 4 or len(self.mean) != 3 or (images.dim() == 3 and len(images) == 3),
                f"mean has 3 values, so each image must have the shape [3, H, W], got {tuple(images.shape)}.",
            )
            images = (images - self.mean) / self.std
        return images
