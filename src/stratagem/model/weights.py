"""The initial weights: made by the model, the same on every rank."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from stratagem.distributed import broadcast, get_world_size

__all__ = ["broadcast_weights"]

_BUCKET_BYTES = 32 * 2**20


def broadcast_weights(model: nn.Module) -> None:
    """Overwrite parameters and buffers on every rank with rank 0's.

    Collective; the models must be alike. Tensors travel in buckets, not one by one.
    """
    if get_world_size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in [*model.parameters(), *model.buffers()]:
        kinds[tensor.dtype, tensor.device].append(tensor.detach())
    for tensors in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            bucket.append(tensor)
            size += tensor.nbytes
            if size >= _BUCKET_BYTES:
                _broadcast_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            _broadcast_bucket(bucket)


def _broadcast_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    broadcast(flat)
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view_as(tensor))
