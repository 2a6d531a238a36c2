"""Labels of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.structures.base_data_element import BaseDataElement
from stratagem.errors import ConfigValueError

__all__ = ["LabelData"]


class LabelData(BaseDataElement):
    """Labels of a sample."""

    @staticmethod
    def onehot_to_label(onehot: Tensor) -> Tensor:
        """Return the indices of the ones in a vector of zeros and ones.

        Raises:
            AssertionError: if it is not a tensor.
            ValueError: if it is not a vector, or has other values.
        """
        require(isinstance(onehot, Tensor), f"The labels must be a tensor, got {type(onehot).__name__}.")
        if onehot.ndim != 1 or not bool(((onehot >= 0) & (onehot <= 1)).all()):
            raise ConfigValueError("input is not one-hot and can not convert to label")
        return onehot.nonzero().squeeze(-1)

    @staticmethod
    def label_to_onehot(label: Tensor, num_classes: int) -> Tensor:
        """Return a vector of ``num_classes`` values with ones at the labels, and zeros elsewhere.

        Raises:
            AssertionError: if it is not a tensor, or a label is not less than ``num_classes``.
        """
        require(isinstance(label, Tensor), f"The labels must be a tensor, got {type(label).__name__}.")
        require(
            label.numel() == 0 or int(label.max()) < num_classes,
            f"A label is not less than num_classes={num_classes}: {label}.",
        )
        onehot = torch.zeros(num_classes, dtype=label.dtype, device=label.device)
        onehot[label] = 1
        return onehot
