"""The device meshes of a sharded model: replicas, shards and tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stratagem.distributed import World
from stratagem.distributed.shared_groups import shared_groups
from stratagem.errors import PlacementError
from stratagem.parallel.fsdp.options import require_rank_counts
from stratagem.utils.torch_private import default_store, flatten_mesh, set_group_timeout

__all__ = ["Layout", "Meshes"]

_AXES = ("replicate", "shard", "tp")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The sizes of the three mesh dimensions. Consecutive ranks are adjacent in the last one.

    Attributes:
        replicate: the number of replicas of the model, each of which is sharded.
        shard: the number of ranks that the parameters of a replica are sharded across. These ranks process different samples.
        tp: the tensor-parallel size: the number of ranks that a layer is sharded across. These ranks process the same samples.
    """

    replicate: int
    shard: int
    tp: int

    @classmethod
    def divide(cls, world_size: int, *, replicate: int, tp: int) -> Layout:
        """Return the layout of ``world_size`` ranks; ``shard`` is ``world_size / (replicate * tp)``.

        Raises:
            ConfigTypeError: if a size is not a positive integer.
            PlacementError: if the product of the sizes does not divide ``world_size``.
        """
        require_rank_counts(replicate=replicate, tp=tp)
        if world_size % (replicate * tp):
            raise PlacementError(
                f"replicate={replicate} x tp={tp} does not divide the {world_size} processes of this run. Start a multiple "
                f"of {replicate * tp} processes, or change replicate and tp."
            )
        return cls(replicate=replicate, shard=world_size // (replicate * tp), tp=tp)

    @property
    def dp_size(self) -> int:
        """The number of parts that the data is split into."""
        return self.replicate * self.shard

    def dp_rank(self, rank: int) -> int:
        """Return the index of the part of the data that a global rank processes."""
        return rank // self.tp


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Meshes:
    """The device meshes of a layout, as seen from this rank.

    Attributes:
        shard: the mesh that parameters are sharded across; with several replicas, their dimension comes first.
        tp: the mesh for tensor parallelism.
        data: the data-parallel group of this rank: ranks that together process all samples; None for all ranks.
    """

    shard: DeviceMesh
    tp: DeviceMesh
    data: torch_dist.ProcessGroup | None

    @classmethod
    def make(cls, layout: Layout, world: World) -> Meshes:
        """Return the meshes and their process groups, with the timeout of the default group. Collective.

        Runs with the same layout share them.
        """
        meshes, groups = shared_groups(("meshes", layout, world.device.type), lambda: _create(layout, world))
        for group in groups:
            set_group_timeout(group, default_store().timeout)
        return meshes


def _create(layout: Layout, world: World) -> tuple[Meshes, list[torch_dist.ProcessGroup]]:
    mesh = init_device_mesh(world.device.type, (layout.replicate, layout.shard, layout.tp), mesh_dim_names=_AXES)
    shard = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
    groups = [mesh.get_group(axis) for axis in _AXES]
    data = None
    if layout.tp > 1:
        data = (flatten_mesh(shard, "data") if layout.replicate > 1 else shard).get_group()
        groups.append(data)
    return Meshes(shard=shard, tp=mesh["tp"], data=data), groups
