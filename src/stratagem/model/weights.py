"""Broadcast the initial weights from rank 0."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from stratagem.distributed import broadcast, get_world_size

__all__ = ["broadcast_weights"]

_BUCKET_BYTES = 32 * 2**20


def broadcast_weights(model: nn.Module) -> None:
    """Overwrite the parameters and buffers on every rank with the values from rank 0.

    Collective; the models must have the same structure. Tensors are broadcast in buckets, on the device that they are on.
    """
    if get_world_size() == 1:
        return
    by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in [*model.parameters(), *model.buffers()]:
        by_type[tensor.dtype, tensor.device].append(tensor.detach())
    for tensors in by_type.values():
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
    # As bytes, because NCCL does not support all dtypes.
    broadcast(flat.view(torch.uint8))
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view_as(tensor))
