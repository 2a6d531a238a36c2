"""Tensors that may be sharded over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stratagem.utils.imports import import_object

__all__ = ["is_plain", "is_sharded", "local_part", "whole"]


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is torch's own dense kind, without asking what else it may be."""
    return type(tensor) in (Tensor, nn.Parameter)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor that this rank has: of a sharded one its shard, else the tensor itself."""
    return _dtensor().to_local(tensor) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in one piece on every rank, another as it is. Collective for a sharded one."""
    return _dtensor().full_tensor(tensor) if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over ranks."""
    return not is_plain(tensor) and isinstance(tensor, _dtensor())


def _dtensor() -> Any:
    # Loaded with the first tensor that is no plain one: importing it takes a while.
    return import_object("torch.distributed.tensor:DTensor")
