"""Operators whose interface changed between versions of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["torch_meshgrid"]


def torch_meshgrid(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``torch.meshgrid`` with matrix indexing."""
    return tuple(torch.meshgrid(*tensors, indexing="ij"))
