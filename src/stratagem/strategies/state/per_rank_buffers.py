"""Buffers of which each rank has its own, such as running statistics of the samples that it sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stratagem.checkpoint import digest_of_tensor
from stratagem.distributed import World, all_gather_object
from stratagem.tensors.dtensor import is_sharded, stack_over_ranks

__all__ = ["read_per_rank_buffers", "write_per_rank_buffers"]


def read_per_rank_buffers(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return the buffers that are not equal on all ranks, with a row for each rank, which writes it itself. Collective.

    The model's own part of a checkpoint has those of rank 0.
    """
    if world.size == 1:
        return {}
    buffers = dict(_kept_buffers(model))
    told = all_gather_object({name: digest_of_tensor(buffer) for name, buffer in buffers.items()})
    return {
        name: stack_over_ranks(buffer, world.size, world.device)
        for name, buffer in buffers.items()
        if any(theirs[name] != told[0][name] for theirs in told)
    }


@torch.no_grad()
def write_per_rank_buffers(saved: Mapping[str, Tensor], model: nn.Module, world: World) -> None:
    """Give this rank the buffers that it had; with another number of ranks all go on with those of rank 0."""
    buffers = dict(_kept_buffers(model))
    for name, rows in saved.items():
        if len(rows) == world.size:
            buffers[name].copy_(rows[world.rank])


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Not by way of the state dict: spread layers put their parameters together for it.
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not is_sharded(buffer):
                yield f"{prefix}.{name}" if prefix else name, buffer
