"""Times of steps, checkpoints and starts, with expected values by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stratagem.hardware import Link, Topology, find_device
from stratagem.planning.timing import Cluster, estimate
from tests.planning.plans import GIB, collective, memory, step

CLUSTER = Cluster(
    name="h100-80g",
    memory=80 * GIB,
    device=find_device("h100-80g"),
    topology=Topology(
        ranks_per_node=8,
        inside=Link(name="fast", bytes_per_second=100e9, latency=0.0, source=""),
        across=Link(name="slow", bytes_per_second=5e9, latency=0.0, source=""),
        adapters=8,
        efficiency=1.0,
    ),
    utilization=0.5,
    allow_tf32=False,
    storage=2e9,
    mtbf_of_a_device=16_000_000.0,
)
MEMORY = memory(parameters=2, gradients=2, optimizer=4)


def test_the_time_of_a_step_is_a_range() -> None:
    """1e15 FLOP at half of 989.4 TFLOP/s take 2.0214 s; the all-gather of 100 GB in a node takes 7/8 s.

    They overlap completely in the shortest case, and not at all in the longest.
    """
    planned = step("FSDP", MEMORY, collectives=(collective("all_gather", 100 * 10**9, group=8),))
    time = estimate(planned, CLUSTER, start_bytes=0).time
    assert time is not None
    assert time.compute == pytest.approx(1e15 / 494.7e12)
    assert time.communication == pytest.approx(0.875)
    assert (time.shortest, time.longest) == (time.compute, pytest.approx(time.compute + 0.875))


def test_throughput_counts_all_samples_of_a_step() -> None:
    """16 ranks with 3 micro-batches of 2 samples process 96 samples in a step of 2.0214 s."""
    found = estimate(step("DDP", MEMORY, accumulation=3), CLUSTER, start_bytes=0)
    assert found.samples_per_second == pytest.approx((96 * 494.7e12 / 1e15,) * 2)


def test_tensor_parallel_ranks_share_their_samples() -> None:
    """With tp=8, the 16 ranks form two data-parallel ranks with 2 samples each."""
    found = estimate(step("FSDP tp=8", MEMORY, dp_size=2), CLUSTER, start_bytes=0)
    assert found.samples_per_second == pytest.approx((4 * 494.7e12 / 1e15,) * 2)


def test_every_message_takes_the_latency() -> None:
    """Ten all-gathers of 10 bytes in a node of 8 have 10 x 7 steps of 1 us; their bytes take no time worth mentioning."""
    slow = replace(CLUSTER, topology=replace(CLUSTER.topology, inside=replace(CLUSTER.topology.inside, latency=1e-6)))  # type: ignore[union-attr,type-var]
    planned = step("FSDP", MEMORY, collectives=(collective("all_gather", 100, count=10, group=8),))
    (part,) = estimate(planned, slow, start_bytes=0).collectives
    assert part.seconds == pytest.approx(70e-6, rel=1e-3)
    assert (part.level, part.sent, part.sent_across) == ("inside nodes", pytest.approx(87.5), 0)


def test_traffic_across_nodes() -> None:
    """An all-reduce of 16 GB on 2 x 8 ranks: a rank sends 2 x 15/16 x 16 GB, a node as much at 8 x 5 GB/s, in 0.75 s."""
    planned = step("DDP", MEMORY, collectives=(collective("all_reduce", 16 * 10**9),))
    (part,) = estimate(planned, CLUSTER, start_bytes=0).collectives
    assert (part.level, part.sent, part.sent_across) == ("across nodes", 30e9, 30e9)
    assert part.seconds == pytest.approx(0.75)


def test_what_cannot_be_estimated_has_a_reason() -> None:
    """Without operations, a device or its rate for a type, there is no time, and the reason is stated."""
    planned = step("DDP", MEMORY)
    cases = {
        "could not be simulated": (replace(planned, flops=None), CLUSTER),
        "choose a device of the table with --device": (planned, replace(CLUSTER, device=None, topology=None)),
        "no rate of v100 for bfloat16": (planned, replace(CLUSTER, name="v100", device=find_device("v100-32g"))),
    }
    for reason, (case, cluster) in cases.items():
        found = estimate(case, cluster, start_bytes=0)
        assert found.time is None
        assert found.no_time is not None
        assert reason in found.no_time
        assert found.samples_per_second is None


def test_checkpoints_and_the_start() -> None:
    """80 GB at 2 GB/s take 40 s. A failure of 16 devices every 1e6 s gives Young's interval of sqrt(2 x 40 x 1e6) s.

    At the start, rank 0 broadcasts 20 GB to both nodes, at 40 GB/s.
    """
    found = estimate(step("FSDP", MEMORY, checkpoint_bytes=80 * 10**9), CLUSTER, start_bytes=20 * 10**9).checkpoint
    assert found is not None
    assert found.seconds == 40
    assert found.interval.young == pytest.approx(8944.27)
    assert (found.start_bytes, found.start_seconds) == (20 * 10**9, pytest.approx(0.5))


def test_ranks_that_compute_their_weights_receive_nothing() -> None:
    """With one rank, or if every rank computes its initial weights, they are not broadcast."""
    for changes in ({"world": 1, "dp_size": 1}, {"options": {"initial_weights": "per_rank"}}):
        found = estimate(step("FSDP", MEMORY, **changes), CLUSTER, start_bytes=20 * 10**9).checkpoint
        assert found is not None
        assert found.start_bytes == 0


def test_memory_is_compared_with_the_device() -> None:
    """2 + 2 + 4 + 8 GiB and the driver's GiB leave 63 of 80 GiB."""
    found = estimate(step("FSDP", MEMORY), CLUSTER, start_bytes=0)
    assert (found.free, found.fits) == (63 * GIB, True)
    large = estimate(step("DDP", memory(parameters=28, gradients=28, optimizer=56)), CLUSTER, start_bytes=0)
    assert (large.free, large.fits) == ((80 - 121) * GIB, False)
    assert estimate(step("DDP", MEMORY), replace(CLUSTER, memory=None), start_bytes=0).fits is None
