"""What ColossalAI's plugins allocate and send in a step, by the rules of its source code (version 0.5.0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from stratagem.planning.ledger import EngineStep, Ledger
from stratagem.planning.timeline import GradientReady, Timeline

__all__ = ["DataParallel", "LowLevelZero", "PluginJob"]

_NORM_BYTES: Final = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PluginJob:
    """What a step of a plugin depends on.

    Attributes:
        world: the number of ranks.
        tp_size: the number of ranks that a layer is sharded across.
        stage: the stage of ZeRO; 0 without ZeRO.
        itemsize: the bytes of an element in the dtype of the computation.
        communication_itemsize: the bytes of an element of reduced gradients.
        groups: the indices of the trainable parameters of each group of the optimizer.
        numels: the number of elements of each parameter of this rank.
        bucket_bytes: the size of the buckets of ``DistributedDataParallel``.
        bucket_elements: the number of elements of the buckets of ZeRO.
        broadcasts: the bytes of the buffers of each dtype, which ``DistributedDataParallel`` broadcasts before a step.
        wraps_replicas: whether the model is wrapped in ``DistributedDataParallel``.
        is_hybrid: whether it is the plugin for tensor parallelism.
        max_norm: the norm to which the plugin clips; 0 for no clipping.
        scales_loss: whether the loss is scaled, as in float16.
        offloads: whether master weights and optimizer state are in the memory of the host.
        temporary: the temporary tensors of the optimizer's update.
    """

    world: int
    tp_size: int
    stage: int
    itemsize: int
    communication_itemsize: int
    groups: tuple[tuple[int, ...], ...]
    numels: tuple[int, ...]
    bucket_bytes: int
    bucket_elements: int
    broadcasts: tuple[int, ...]
    wraps_replicas: bool
    is_hybrid: bool
    max_norm: float
    scales_loss: bool
    offloads: bool
    temporary: int

    @property
    def dp_size(self) -> int:
        """The number of ranks that process different samples."""
        return self.world // self.tp_size

    def padded(self, parameter: int) -> int:
        """Return the number of elements of a parameter with the padding of ZeRO."""
        return math.ceil(self.numels[parameter] / self.dp_size) * self.dp_size


class _PluginStep(EngineStep):
    def __init__(self, job: PluginJob, ledger: Ledger, timeline: Timeline) -> None:
        super().__init__(ledger, timeline, job.world)
        self.job = job
        self._buckets = _replica_buckets(job, timeline)
        self._missing: list[set[int]] = []
        # The bytes of the gradients that exist.
        self._held: dict[int, int] = {}
        for nbytes in job.broadcasts:
            ledger.send("broadcast", nbytes, job.dp_size, stride=job.tp_size)

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        if parameter in self._held:
            self.ledger.add("gradients", -nbytes)
        else:
            self._held[parameter] = nbytes
        if last:
            self._complete_bucket(parameter)

    def _complete_bucket(self, parameter: int) -> None:
        """Reduce the bucket of a replica if this was its last gradient."""
        if not self._missing:
            self._missing = [set(each) for each in self._buckets]
        for bucket, missing in zip(self._buckets, self._missing, strict=True):
            if parameter in missing:
                missing.discard(parameter)
                if not missing:
                    nbytes = sum(self.job.numels[each] for each in bucket) * self.job.itemsize
                    self.ledger.send("all_reduce", nbytes, self.job.dp_size, stride=self.job.tp_size)

    def _settle(self) -> None:
        """Count what this package sends to check gradients, as a run does by default."""
        self.sum_weights()
        if self.job.world > 1:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.world)

    def _run_optimizer(self) -> None:
        if not self.job.offloads:
            self.ledger.add("temporary", self.job.temporary)
            self.ledger.add("temporary", -self.job.temporary)


def _replica_buckets(job: PluginJob, timeline: Timeline) -> list[list[int]]:
    """Return the parameters of each bucket of ``DistributedDataParallel``, after its first step."""
    if not job.wraps_replicas:
        return []
    buckets: list[list[int]] = []
    current: list[int] = []
    size = 0
    for event in timeline.events:
        if isinstance(event, GradientReady):
            current.append(event.parameter)
            size += job.numels[event.parameter] * job.itemsize
            if size >= job.bucket_bytes:
                buckets.append(current)
                current, size = [], 0
    return [*buckets, current] if current else buckets


@final
class DataParallel(_PluginStep):
    """Plugins without ZeRO: ``DistributedDataParallel``, in 16 bits with master weights."""

    def end_backward(self, *, last: bool) -> None:
        """Do nothing, because the backward pass reduces the gradients."""

    def update(self) -> None:
        self._settle()
        if self.job.itemsize < 4:
            for parameter in self._held:
                self.ledger.add("gradients", 4 * self.job.numels[parameter])
                self.ledger.add("gradients", -self._held[parameter])
        if self.job.max_norm > 0 and self.job.tp_size > 1:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.tp_size)
        self._run_optimizer()
        self.ledger.set("gradients", 0)


@final
class LowLevelZero(_PluginStep):
    """ZeRO: each rank updates a range of each parameter. In stage 1, whole gradients exist until the update."""

    def __init__(self, job: PluginJob, ledger: Ledger, timeline: Timeline) -> None:
        super().__init__(job, ledger, timeline)
        self._bucket: list[int] = []
        self._elements = 0
        self._group_of = {index: number for number, group in enumerate(job.groups) for index in group}
        # The parameters whose gradients were reduced in earlier micro-batches.
        self._reduced: set[int] = set()

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        super().gradient_ready(parameter, nbytes, last=last)
        if self.job.stage == 2:
            self._put(parameter)

    def _put(self, parameter: int) -> None:
        is_full = self._elements + self.job.numels[parameter] > self.job.bucket_elements
        if self._bucket and (is_full or self._group_of[parameter] != self._group_of[self._bucket[-1]]):
            self._reduce()
        self._bucket.append(parameter)
        self._elements += self.job.padded(parameter)

    def _reduce(self) -> None:
        if not self._bucket:
            return
        for parameter in self._bucket:
            padded = self.job.padded(parameter) * self.job.itemsize
            if self.job.padded(parameter) != self.job.numels[parameter]:
                self.ledger.add("gradients", padded)
                self.ledger.add("gradients", -self._held[parameter])
                self._held[parameter] = padded
        flat = sum(map(self.job.padded, self._bucket))
        nbytes = flat * self.job.communication_itemsize
        copied = flat * self.job.itemsize
        if self.job.communication_itemsize != self.job.itemsize:
            copied += nbytes
        self.ledger.add("communication", copied)
        # The reduced gradients stay in the message, or in stage 2 in the part of it that this rank receives.
        kept = flat * self.job.itemsize // (self.job.dp_size if self.job.stage == 2 else 1)
        self.ledger.send(
            "reduce_scatter" if self.job.stage == 2 else "all_reduce", nbytes, self.job.dp_size, stride=self.job.tp_size
        )
        self.ledger.add("gradients", kept)
        self.ledger.add("communication", -copied)
        self.ledger.add("gradients", -sum(self._held.pop(each) for each in self._bucket))
        if self._reduced.issuperset(self._bucket):
            self.ledger.add("gradients", -kept)
        self._reduced.update(self._bucket)
        self._bucket, self._elements = [], 0

    def end_backward(self, *, last: bool) -> None:
        self.ledger.phase = "update"
        if self.job.stage == 1 and last:
            for group in self.job.groups:
                for parameter in group:
                    if parameter in self._held:
                        self._put(parameter)
        if self.job.stage == 2 or last:
            self._reduce()

    def update(self) -> None:
        self._settle()
        if self.job.scales_loss:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.world)
        partition = sum(self.job.padded(each) // self.job.dp_size for group in self.job.groups for each in group)
        if self.job.itemsize < 4 and not self.job.offloads:
            self.ledger.add("gradients", 4 * partition)
        for _ in self.job.groups:
            self._reduce_norm()
        self._run_optimizer()
        if self.job.itemsize < 4 and not self.job.offloads:
            self.ledger.add("gradients", -4 * partition)
        self._gather_updated()
        # The reduced gradients are freed after the update.
        self.ledger.set("gradients", 0)

    def _reduce_norm(self) -> None:
        if not self.job.is_hybrid or self.job.dp_size > 1:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.dp_size, stride=self.job.tp_size)
        if self.job.tp_size > 1:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.tp_size)

    def _gather_updated(self) -> None:
        # Ranges whose dtype or device differs from that of the parameters are copied, and kept until their message is sent.
        copies = self.job.itemsize if self.job.itemsize < 4 or self.job.offloads else 0
        waiting: list[int] = []
        for parameter in (each for group in self.job.groups for each in group):
            part = self.job.padded(parameter) // self.job.dp_size
            self.ledger.add("communication", part * copies)
            if part > self.job.bucket_elements:
                self._send_updated(part)
                self.ledger.add("communication", -part * copies)
                continue
            if sum(waiting) + part > self.job.bucket_elements:
                self._gather(waiting)
                self.ledger.add("communication", -sum(waiting) * copies)
                waiting = []
            waiting.append(part)
        if waiting:
            self._gather(waiting)
            self.ledger.add("communication", -sum(waiting) * copies)

    def _gather(self, parts: Sequence[int]) -> None:
        """Copy ranges of this rank to a message, and the result to the parameters."""
        part_bytes = sum(parts) * self.job.itemsize
        # Each parameter is put together from the ranges of all ranks, while that of the previous one still exists.
        together = max(before + after for before, after in zip([0, *parts], parts, strict=False))
        copied = together * self.job.dp_size * self.job.itemsize
        message = part_bytes * (1 + self.job.dp_size)
        self.ledger.add("communication", message)
        self._send_updated(sum(parts))
        self.ledger.add("communication", copied)
        self.ledger.add("communication", -copied - message)

    def _send_updated(self, numel: int) -> None:
        nbytes = numel * self.job.dp_size * self.job.itemsize
        self.ledger.send("all_gather", nbytes, self.job.dp_size, stride=self.job.tp_size)
