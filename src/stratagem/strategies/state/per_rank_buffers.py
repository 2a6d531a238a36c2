"""Read and write buffers that differ between ranks, such as the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stratagem.checkpoint import digest_of_tensor
from stratagem.distributed import World, all_gather_object
from stratagem.tensors.dtensor import is_sharded, stack_over_ranks

__all__ = ["read_per_rank_buffers", "write_per_rank_buffers"]


def read_per_rank_buffers(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return the buffers that differ between ranks as tensors with one row per rank; each rank holds its own row. Collective.

    The model state in a checkpoint contains the buffers of rank 0.
    """
    if world.size == 1:
        return {}
    buffers = dict(_kept_buffers(model))
    digests = all_gather_object({name: digest_of_tensor(buffer) for name, buffer in buffers.items()})
    return {
        name: stack_over_ranks(buffer, world.size, world.device)
        for name, buffer in buffers.items()
        if any(each[name] != digests[0][name] for each in digests)
    }


@torch.no_grad()
def write_per_rank_buffers(saved: Mapping[str, Tensor], model: nn.Module, world: World) -> None:
    """Restore the buffers of this rank. If the number of ranks has changed, all ranks keep the buffers of rank 0."""
    buffers = dict(_kept_buffers(model))
    for name, rows in saved.items():
        if len(rows) == world.size:
            buffers[name].copy_(rows[world.rank])


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Do not use the state dict: tensor-parallel layers of engines would gather their parameters for it.
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not is_sharded(buffer):
                yield f"{prefix}.{name}" if prefix else name, buffer
