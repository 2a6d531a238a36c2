"""Times and traffic of collectives, with expected values by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stratagem.hardware import Collective, Group, Link, Topology, collective_seconds
from stratagem.hardware.collective_time import Traffic, traffic_of

# Round numbers: 100 GB/s inside a node, four adapters with 10 GB/s each, no latency and no loss.
FAST = Link(name="fast", bytes_per_second=100e9, latency=0.0, source="")
SLOW = Link(name="slow", bytes_per_second=10e9, latency=0.0, source="")
CLUSTER = Topology(ranks_per_node=4, inside=FAST, across=SLOW, adapters=4, efficiency=1.0)
NODE = Group(size=4, per_node=4)
TWO_NODES = Group(size=8, per_node=4)


def test_an_all_gather_in_a_node() -> None:
    """Each of 4 ranks sends 3/4 of the 100 GB: 75 GB at 100 GB/s take 0.75 s."""
    assert collective_seconds(Collective.ALL_GATHER, 100e9, NODE, CLUSTER) == pytest.approx(0.75)


def test_an_all_reduce_takes_two_rounds() -> None:
    """Reduce-scatter and all-gather: 150 GB at 100 GB/s."""
    assert collective_seconds(Collective.ALL_REDUCE, 100e9, NODE, CLUSTER) == pytest.approx(1.5)


def test_the_adapters_of_a_node_limit_a_ring_across_nodes() -> None:
    """Of 8 ranks, each sends 7/8 of 100 GB, and the last of a node sends its part through adapters with 40 GB/s together."""
    assert collective_seconds(Collective.REDUCE_SCATTER, 100e9, TWO_NODES, CLUSTER) == pytest.approx(87.5 / 40)


def test_groups_that_communicate_at_the_same_time_share_the_adapters() -> None:
    """Each of the 4 groups with one rank per node has a quarter of 40 GB/s, and each rank sends half of 100 GB."""
    across = Group(size=2, per_node=1)
    assert collective_seconds(Collective.ALL_GATHER, 100e9, across, CLUSTER) == pytest.approx(5.0)


def test_a_slow_link_in_the_node_limits_a_ring_across_nodes() -> None:
    """If the network is faster than the links of the devices, these decide: 87.5 GB at 10 GB/s."""
    reversed_speeds = replace(CLUSTER, inside=SLOW, across=FAST)
    assert collective_seconds(Collective.ALL_GATHER, 100e9, TWO_NODES, reversed_speeds) == pytest.approx(8.75)


def test_small_messages_take_the_latency_of_all_steps() -> None:
    """An all-gather of 8 ranks on two nodes has 7 steps, one of them across nodes: 6 us and 10 us."""
    slow = replace(CLUSTER, inside=replace(FAST, latency=1e-6), across=replace(SLOW, latency=10e-6))
    assert collective_seconds(Collective.ALL_GATHER, 0, TWO_NODES, slow) == pytest.approx(16e-6)


def test_a_small_all_reduce_uses_a_tree() -> None:
    """On 256 nodes of 4: a ring has 2 (768 + 255 x 10) us, a tree 2 (3 + 8 x 10) us."""
    slow = replace(CLUSTER, inside=replace(FAST, latency=1e-6), across=replace(SLOW, latency=10e-6))
    assert collective_seconds(Collective.ALL_REDUCE, 0, Group(size=1024, per_node=4), slow) == pytest.approx(166e-6)


def test_a_measured_bandwidth_is_not_reduced() -> None:
    """Data sheets are multiplied by the efficiency; a measured all-reduce already contains it, for all adapters of a node."""
    half = replace(CLUSTER, efficiency=0.5)
    assert collective_seconds(Collective.ALL_GATHER, 100e9, NODE, half) == pytest.approx(1.5)
    measured = replace(half, inside=replace(FAST, is_measured=True), across=replace(SLOW, is_measured=True))
    assert collective_seconds(Collective.ALL_GATHER, 100e9, NODE, measured) == pytest.approx(0.75)
    assert collective_seconds(Collective.ALL_GATHER, 100e9, TWO_NODES, measured) == pytest.approx(8.75)


def test_all_to_all_sends_directly() -> None:
    """Each of 8 ranks sends 4/8 of 10 GB to the other node: 20 GB of a node at 40 GB/s, slower than 8.75 GB at 100 GB/s."""
    assert collective_seconds(Collective.ALL_TO_ALL, 10e9, TWO_NODES, CLUSTER) == pytest.approx(0.5)


def test_one_rank_communicates_with_nobody() -> None:
    """A group of one rank sends nothing and takes no time."""
    alone = Group(size=1, per_node=1)
    for collective in Collective:
        assert collective_seconds(collective, 100e9, alone, CLUSTER) == 0
        assert traffic_of(collective, 100e9, alone) == Traffic(per_rank=0, across_per_node=0)


def test_traffic_by_level() -> None:
    """Of an all-reduce of 80 bytes on two nodes, each rank sends 140 bytes, and each node as many to the other."""
    assert traffic_of(Collective.ALL_REDUCE, 80, TWO_NODES) == Traffic(per_rank=140, across_per_node=140)
    assert traffic_of(Collective.ALL_REDUCE, 80, NODE) == Traffic(per_rank=120, across_per_node=0)
    assert traffic_of(Collective.ALL_TO_ALL, 80, TWO_NODES) == Traffic(per_rank=70, across_per_node=160)
    assert traffic_of(Collective.BROADCAST, 80, TWO_NODES) == Traffic(per_rank=80, across_per_node=80)
