"""Save and restore buffers that differ between ranks, such as the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stratagem.checkpoint import with_known_names
from stratagem.distributed import World
from stratagem.strategies.state.synced_buffers import iter_buffers
from stratagem.tensors.dtensor import has_all_values, stack_over_ranks, to_local

__all__ = ["stack_per_rank_buffers", "write_per_rank_buffers"]


def stack_per_rank_buffers(own: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return buffers that differ between ranks as tensors with one row per rank; each rank holds its own row. Collective."""
    return {name: stack_over_ranks(value, world.size, world.device) for name, value in own.items()}


@torch.no_grad()
def write_per_rank_buffers(saved: Mapping[str, Tensor], model: nn.Module, world: World) -> None:
    """Restore the buffers of this rank. If the number of ranks has changed, all ranks keep the buffers of the model state."""
    buffers = {each.name: each.tensor for each in iter_buffers(model) if each.is_persistent}
    for name, rows in with_known_names(saved, buffers).items():
        if len(rows) == world.size and has_all_values(buffers[name]):
            to_local(buffers[name]).copy_(rows[world.rank])
