"""Maps of the pixels of an image."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from torch import Tensor

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.structures.base_data_element import BaseDataElement
from stratagem.errors import ConfigTypeError

__all__ = ["PixelData"]


class PixelData(BaseDataElement):
    """Maps of the pixels of an image: tensors or arrays of the shape (channels, height, width), all of one size.

    A map without channels receives one channel, with a warning.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if self._set_own(name, value):
            return
        if not isinstance(value, Tensor | np.ndarray):
            raise InvalidArgumentError(f"{name!r} must be a tensor or an array, got {type(value).__name__}.")
        if self.shape and tuple(value.shape[-2:]) != self.shape:
            raise InvalidArgumentError(
                f"{name!r} has the height and width {tuple(value.shape[-2:])}, but the other fields have {self.shape}."
            )
        require(value.ndim in (2, 3), f"{name!r} must have 2 or 3 dimensions, got {value.ndim}.")
        if value.ndim == 2:
            value = value[None]
            warnings.warn(
                f"The shape of {name!r} changes from {tuple(value.shape[-2:])} to {tuple(value.shape)}.", stacklevel=2
            )
        super().__setattr__(name, value)

    def __getitem__(self, item: tuple[int | slice, int | slice]) -> Self:
        """Return the maps of a part of the image: ``pixels[rows, columns]``. An index selects one row or column.

        Raises:
            AssertionError: if there are not two indices.
            TypeError: if an index is neither a number nor a slice.
        """
        if not isinstance(item, tuple):
            raise ConfigTypeError(f"Unsupported type {type(item)} for slicing PixelData")
        require(len(item) == 2, f"PixelData is sliced by height and width, got {len(item)} indices.")
        size = self.shape or (0, 0)
        parts = (slice(None), *(_as_slice(index, length) for index, length in zip(item, size, strict=True)))
        created = type(self)(metainfo=self.metainfo)
        for name, value in self.items():
            setattr(created, name, value[parts])
        return created

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The height and width of the maps; None without maps."""
        return tuple(self.values()[0].shape[-2:]) if self._data_fields else None


def _as_slice(index: int | slice, length: int) -> slice:
    if isinstance(index, slice):
        return index
    if not isinstance(index, int):
        raise ConfigTypeError(f"An index of PixelData must be a number or a slice, got {index!r}.")
    return slice(index, None, length)
