"""The time and the traffic of collectives, from their bytes, their group and the links between its ranks.

The model is the one with which NCCL selects its algorithms (``src/graph/tuning.cc``): the bytes of the busiest link divided by
its bandwidth, plus the latency of each step. Rings are used for all collectives; all-reduce uses a tree if it is faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final, final

from stratagem.hardware.links import Link

__all__ = ["LINK_EFFICIENCY", "Collective", "Group", "Topology", "Traffic", "collective_seconds", "traffic_of"]

# The part of the bandwidth of the wires that collectives with large messages reach. The 230 GB/s of 300 that NVIDIA measures for
# all-reduce on a node with A100 GPUs are 77 %.
LINK_EFFICIENCY: Final = 0.8
# NCCL assumes that trees reach this part of the bandwidth of rings.
_TREE_EFFICIENCY: Final = 0.9


@final
class Collective(Enum):
    """A collective operation. Its size is that of the tensor in parentheses."""

    ALL_REDUCE = "all_reduce"  # the input of a rank
    ALL_GATHER = "all_gather"  # the output of a rank
    REDUCE_SCATTER = "reduce_scatter"  # the input of a rank
    BROADCAST = "broadcast"  # the input of the source
    REDUCE = "reduce"  # the input of a rank
    SCATTER = "scatter"  # the input of the source
    GATHER = "gather"  # the output of the destination
    ALL_TO_ALL = "all_to_all"  # the input of a rank
    SEND = "send"  # the message


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of a collective.

    Attributes:
        size: the number of ranks.
        per_node: the number of them on each node. A node may have further ranks, whose groups run the same collective at the same
            time and share the network adapters.
    """

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return math.ceil(self.size / self.per_node)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The nodes of a cluster.

    Attributes:
        ranks_per_node: the number of ranks on a node, one for each device.
        inside: the link of a device to the other devices of its node.
        across: the link of a network adapter to other nodes, or the measured link of a whole node.
        adapters: the number of network adapters of a node.
        efficiency: the part of the bandwidth of links that collectives reach. Measured links are not reduced.
    """

    ranks_per_node: int
    inside: Link
    across: Link
    adapters: int
    efficiency: float = LINK_EFFICIENCY

    @property
    def inside_bandwidth(self) -> float:
        """Bytes per second from a device to the others of its node."""
        return self.inside.bytes_per_second * (1.0 if self.inside.is_measured else self.efficiency)

    @property
    def node_bandwidth(self) -> float:
        """Bytes per second from a node to the network."""
        if self.across.is_measured:
            return self.across.bytes_per_second
        return self.adapters * self.across.bytes_per_second * self.efficiency


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The bytes that a collective sends.

    Attributes:
        per_rank: the bytes that each rank sends. For a collective with a root, those of the busiest rank.
        across_per_node: of these, the bytes that the ranks of the group on a node send to other nodes, together.
    """

    per_rank: float
    across_per_node: float


def traffic_of(collective: Collective, nbytes: float, group: Group) -> Traffic:
    """Return the bytes that a collective sends with rings, or directly for all-to-all and messages.

    Args:
        collective: the operation.
        nbytes: its size as defined by ``Collective``.
        group: the ranks.
    """
    n = group.size
    if n == 1:
        return Traffic(per_rank=0.0, across_per_node=0.0)
    share = nbytes * (n - 1) / n
    crosses = group.nodes > 1
    match collective:
        case Collective.ALL_REDUCE:
            return Traffic(per_rank=2 * share, across_per_node=2 * share * crosses)
        case Collective.ALL_GATHER | Collective.REDUCE_SCATTER:
            return Traffic(per_rank=share, across_per_node=share * crosses)
        case Collective.ALL_TO_ALL | Collective.SCATTER | Collective.GATHER:
            senders = group.per_node if collective is Collective.ALL_TO_ALL else 1
            return Traffic(per_rank=share, across_per_node=senders * nbytes * (n - min(n, group.per_node)) / n)
        case Collective.BROADCAST | Collective.REDUCE | Collective.SEND:
            return Traffic(per_rank=nbytes, across_per_node=nbytes * crosses)


def collective_seconds(collective: Collective, nbytes: float, group: Group, topology: Topology) -> float:
    """Return the duration of a collective in seconds; 0 for a group of one rank.

    Args:
        collective: the operation.
        nbytes: its size as defined by ``Collective``.
        group: the ranks.
        topology: the nodes and their links.
    """
    if group.size == 1:
        return 0.0
    traffic = traffic_of(collective, nbytes, group)
    seconds = _transfer(traffic, group, topology) + _ring_latency(collective, group, topology)
    return min(seconds, _tree(nbytes, group, topology)) if collective is Collective.ALL_REDUCE else seconds


def _transfer(traffic: Traffic, group: Group, topology: Topology) -> float:
    inside = traffic.per_rank / topology.inside_bandwidth if group.per_node > 1 else 0.0
    return max(inside, traffic.across_per_node / _bandwidth_of_group(group, topology))


def _bandwidth_of_group(group: Group, topology: Topology) -> float:
    """Return the part of the bandwidth of a node that remains for one group while all groups communicate."""
    return topology.node_bandwidth * min(1.0, group.per_node / topology.ranks_per_node)


def _ring_latency(collective: Collective, group: Group, topology: Topology) -> float:
    if collective in {Collective.SEND, Collective.ALL_TO_ALL, Collective.SCATTER, Collective.GATHER}:
        # The messages to different ranks are in flight at the same time.
        return topology.across.latency if group.nodes > 1 else topology.inside.latency
    rounds = 2 if collective is Collective.ALL_REDUCE else 1
    across = group.nodes - 1
    return rounds * ((group.size - 1 - across) * topology.inside.latency + across * topology.across.latency)


def _tree(nbytes: float, group: Group, topology: Topology) -> float:
    """Return the duration of an all-reduce with a chain in each node and a double binary tree of the nodes."""
    slowest = _bandwidth_of_group(group, topology) if group.nodes > 1 else math.inf
    if group.per_node > 1:
        slowest = min(slowest, topology.inside_bandwidth)
    depth = math.ceil(math.log2(group.nodes))
    chain = min(group.size, group.per_node) - 1
    latency = 2 * (chain * topology.inside.latency + depth * topology.across.latency)
    return 2 * nbytes / (_TREE_EFFICIENCY * slowest) + latency
