"""Move batches to the model's device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BaseDataPreprocessor", "to_device"]

_CPU = torch.device("cpu")


def to_device(data: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Move all tensors in ``data`` to ``device``.

    Mappings, lists, tuples and objects with a ``to`` method are supported; anything else is returned unchanged.
    """
    if isinstance(data, Tensor):
        return data if data.device == device else data.to(device, non_blocking=non_blocking)
    if isinstance(data, tuple):
        moved = [to_device(item, device, non_blocking=non_blocking) for item in data]
        return type(data)(*moved) if hasattr(data, "_fields") else tuple(moved)
    if isinstance(data, list):
        return [to_device(item, device, non_blocking=non_blocking) for item in data]
    if isinstance(data, Mapping):
        return type(data)(  # type: ignore[call-arg]
            {key: to_device(item, device, non_blocking=non_blocking) for key, item in data.items()}
        )
    move = getattr(data, "to", None)
    return move(device) if callable(move) else data


class BaseDataPreprocessor(nn.Module):
    """Move batches to the model's device. Subclass it to normalize or stack the data as well.

    It is a submodule of the model, so it moves to the model's device.

    Args:
        non_blocking: whether copies from pinned memory may overlap with computation.
    """

    device: torch.device

    def __init__(self, *, non_blocking: bool = False) -> None:
        super().__init__()
        self.device = _CPU
        self.non_blocking = non_blocking

    def __call__(self, data: Any, training: bool = False) -> Any:
        # On the hot path: calling a module is expensive if there is nothing to do.
        idle = self.device == _CPU and type(self).forward is BaseDataPreprocessor.forward
        if idle and not (self._forward_hooks or self._forward_pre_hooks):
            return data
        return super().__call__(data, training)

    def _apply(self, fn: Any, recurse: bool = True) -> BaseDataPreprocessor:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Apply `to`, `cuda`, `cpu`, ... to a tensor to find the new device.
        self.device = fn(torch.empty(0, device=self.device)).device
        return self

    def forward(self, data: Any, training: bool = False) -> Any:
        """Return ``data`` on the model's device. ``training`` specifies whether this is a training step."""
        # Data loaders yield CPU tensors, so for a model on the CPU there is nothing to move.
        return data if self.device == _CPU else to_device(data, self.device, non_blocking=self.non_blocking)
