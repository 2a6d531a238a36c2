"""Estimate the time of a step, of a checkpoint and of the start of a job, from a plan and the data of its cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from stratagem.hardware import (
    Collective,
    Device,
    Group,
    SaveInterval,
    Topology,
    collective_seconds,
    format_seconds,
    save_interval,
)
from stratagem.hardware.collective_time import traffic_of
from stratagem.planning.result import Collective as PlannedCollective
from stratagem.planning.result import StepPlan

__all__ = [
    "DEFAULT_STORAGE",
    "DEFAULT_UTILIZATION",
    "CheckpointEstimate",
    "Cluster",
    "CollectiveEstimate",
    "Estimate",
    "TimeEstimate",
    "estimate",
]

# The part of the dense peak rate that the matrix products of well-tuned training reach. Llama 3 was trained with 38 to 43 %
# ("The Llama 3 Herd of Models", 2024, table 4).
DEFAULT_UTILIZATION: Final = 0.4
# The bandwidth at which all ranks together write a checkpoint, in bytes per second; an assumption.
DEFAULT_STORAGE: Final = 2e9
# A message is received at the same time as it is sent.
_SAME_KIND: Final = {"recv": "send"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The devices, links and storage of a job.

    Attributes:
        name: the name of the device, or its memory if it is not in the table.
        memory: the memory of a device in bytes; None if unknown.
        device: the entry of the table; None if it is not in the table.
        topology: the links; None if unknown.
        utilization: the part of the dense peak rate that is reached.
        allow_tf32: whether products of float32 matrices use TF32.
        storage: the bandwidth at which all ranks together write a checkpoint, in bytes per second.
        mtbf_of_a_device: the mean seconds between failures of one device.
        assumptions: what was assumed instead of specified, one sentence each.
    """

    name: str
    memory: int | None
    device: Device | None
    topology: Topology | None
    utilization: float
    allow_tf32: bool
    storage: float
    mtbf_of_a_device: float
    assumptions: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveEstimate:
    """The collectives of one kind and group in a step.

    Attributes:
        planned: the collectives.
        level: ``"inside nodes"`` or ``"across nodes"``.
        sent: the bytes that each rank sends.
        sent_across: the bytes that the ranks of the group on a node send to other nodes, together.
        seconds: their duration without overlap; None if the links are unknown.
    """

    planned: PlannedCollective
    level: str
    sent: float
    sent_across: float
    seconds: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """The duration of an optimizer step with all its micro-batches.

    Attributes:
        compute: the seconds of computation.
        communication: the seconds of communication.
        peak: the dense peak rate for the dtype of most operations, in FLOP/s.
    """

    compute: float
    communication: float
    peak: float

    @property
    def shortest(self) -> float:
        """Seconds if communication and computation overlap completely."""
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float:
        """Seconds if they do not overlap at all."""
        return self.compute + self.communication

    def __str__(self) -> str:
        short, long = format_seconds(self.shortest), format_seconds(self.longest)
        return short if short == long else f"{short} to {long}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEstimate:
    """The checkpoints of a job.

    Attributes:
        size: bytes of a checkpoint.
        seconds: the duration of a save.
        interval: how often to save.
        start_bytes: the bytes that rank 0 broadcasts to all ranks when the job starts.
        start_seconds: the duration of this broadcast; None if the links are unknown.
    """

    size: int
    seconds: float
    interval: SaveInterval
    start_bytes: int
    start_seconds: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A plan with its times on one cluster.

    Attributes:
        step: the plan.
        cluster: the cluster.
        collectives: the collectives of a step, the one with the most bytes first.
        time: the duration of a step; None if it cannot be estimated.
        no_time: why it cannot be estimated; None if it can.
        checkpoint: the checkpoints; None if nothing is saved.
    """

    step: StepPlan
    cluster: Cluster
    collectives: tuple[CollectiveEstimate, ...]
    time: TimeEstimate | None
    no_time: str | None
    checkpoint: CheckpointEstimate | None

    @property
    def free(self) -> int | None:
        """The memory that remains on the device, negative if it is too small; None if the size of the device is unknown."""
        return None if self.cluster.memory is None else self.cluster.memory - self.step.memory.total

    @property
    def fits(self) -> bool | None:
        """Whether the job fits the device; None if the size of the device is unknown or the strategy cannot train the model."""
        if self.step.refusal is not None or self.free is None:
            return None
        return self.free >= 0

    @property
    def samples_per_second(self) -> tuple[float, float] | None:
        """The samples that all ranks process per second, without and with complete overlap; None if unknown."""
        if self.time is None or self.step.micro_batch is None:
            return None
        samples = self.step.micro_batch * self.step.accumulation * self.step.dp_size
        return samples / self.time.longest, samples / self.time.shortest


def estimate(step: StepPlan, cluster: Cluster, *, start_bytes: int) -> Estimate:
    """Return the times of a plan on a cluster.

    Args:
        step: the plan.
        cluster: the cluster.
        start_bytes: the bytes of parameters and buffers that rank 0 broadcasts when the job starts.
    """
    collectives = sorted(
        (_estimate_collective(each, cluster.topology) for each in step.collectives), key=lambda each: -each.sent
    )
    time, no_time = _estimate_time(step, cluster, collectives)
    return Estimate(
        step=step,
        cluster=cluster,
        collectives=tuple(collectives),
        time=time,
        no_time=no_time,
        checkpoint=_estimate_checkpoint(step, cluster, start_bytes),
    )


def _estimate_collective(planned: PlannedCollective, topology: Topology | None) -> CollectiveEstimate:
    kind = Collective(_SAME_KIND.get(planned.kind, planned.kind))
    group = Group(size=planned.group_size, per_node=planned.ranks_per_node)
    # All messages of one kind are planned together; the latency counts for each.
    each = planned.bytes / max(1, planned.count)
    traffic = traffic_of(kind, each, group)
    seconds = None if topology is None else planned.count * collective_seconds(kind, each, group, topology)
    return CollectiveEstimate(
        planned=planned,
        level="inside nodes" if planned.inside_node else "across nodes",
        sent=planned.count * traffic.per_rank,
        sent_across=planned.count * traffic.across_per_node,
        seconds=seconds,
    )


def _estimate_time(
    step: StepPlan, cluster: Cluster, collectives: Sequence[CollectiveEstimate]
) -> tuple[TimeEstimate | None, str | None]:
    if step.refusal is not None:
        return None, None
    if step.flops is None:
        return None, "the step could not be simulated, so its operations are unknown"
    if cluster.device is None or cluster.topology is None:
        return None, f"the rates of {cluster.name} are unknown; choose a device of the table with --device"
    peak = cluster.device.peak_of(step.compute_dtype, allow_tf32=cluster.allow_tf32)
    if peak is None:
        return None, f"the table has no rate of {cluster.name} for {step.compute_dtype}"
    communication = sum(each.seconds or 0.0 for each in collectives)
    compute = step.flops / (peak * cluster.utilization)
    return TimeEstimate(compute=compute, communication=communication, peak=peak), None


def _estimate_checkpoint(step: StepPlan, cluster: Cluster, start_bytes: int) -> CheckpointEstimate | None:
    if step.refusal is not None or not step.checkpoint_bytes:
        return None
    seconds = step.checkpoint_bytes / cluster.storage
    sent = start_bytes if step.world > 1 and step.options.get("initial_weights") != "per_rank" else 0
    group = Group(size=step.world, per_node=min(step.world, step.gpus_per_node))
    start = (
        None if cluster.topology is None else collective_seconds(Collective.BROADCAST, sent, group, cluster.topology)
    )
    return CheckpointEstimate(
        size=step.checkpoint_bytes,
        seconds=seconds,
        interval=save_interval(save=seconds, devices=step.world, mtbf_of_a_device=cluster.mtbf_of_a_device),
        start_bytes=sent,
        start_seconds=start,
    )
