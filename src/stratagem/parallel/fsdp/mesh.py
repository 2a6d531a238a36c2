"""How the ranks of a run are laid out: replicas of groups that share the shards of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stratagem.distributed import World
from stratagem.errors import ConfigTypeError, PlacementError

__all__ = ["Layout", "Meshes"]

_AXES = ("replicate", "shard", "tp")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A rank's place on three axes; ranks that are neighbours in number are neighbours on the last.

    Attributes:
        replicate: how many replicas of the model there are, each of them sharded.
        shard: over how many ranks the parameters of a replica are sharded; each has samples of its own.
        tp: over how many ranks a layer's own arithmetic is spread; these see the same samples.
    """

    replicate: int
    shard: int
    tp: int

    @classmethod
    def divide(cls, world_size: int, *, replicate: int, tp: int) -> Layout:
        """Lay ``world_size`` ranks out; what ``replicate`` and ``tp`` leave is the shards' axis.

        Raises:
            ConfigTypeError: if a number is no positive whole one.
            PlacementError: if they do not divide the world.
        """
        for name, value in {"replicate": replicate, "tp": tp}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigTypeError(f"{name} is {value!r}; a whole number of ranks, at least 1, is due.")
        if world_size % (replicate * tp):
            raise PlacementError(
                f"replicate={replicate} x tp={tp} ranks do not divide the {world_size} processes of this run. Start a "
                f"multiple of {replicate * tp}, or change replicate and tp."
            )
        return cls(replicate=replicate, shard=world_size // (replicate * tp), tp=tp)

    @property
    def dp_size(self) -> int:
        """How many ranks have samples of their own."""
        return self.replicate * self.shard

    def dp_rank(self, rank: int) -> int:
        """Return which of the ``dp_size`` parts of the samples a global rank sees."""
        return rank // self.tp


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Meshes:
    """The meshes of torch that a layout stands for, as seen from this rank.

    Attributes:
        shard: what parameters are sharded over, with the replicas' axis before it where there are several.
        tp: what a layer's arithmetic is spread over.
        data: the ranks that see other samples than this one and together with it all of them; None for all ranks.
    """

    shard: DeviceMesh
    tp: DeviceMesh
    data: torch_dist.ProcessGroup | None

    @classmethod
    def make(cls, layout: Layout, world: World) -> Meshes:
        """Make the meshes and their process groups. Collective."""
        sizes = (layout.replicate, layout.shard, layout.tp)
        mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=_AXES)
        shard = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
        data = None
        if layout.tp > 1:
            data = (shard._flatten("data") if layout.replicate > 1 else shard).get_group()
        return cls(shard=shard, tp=mesh["tp"], data=data)
