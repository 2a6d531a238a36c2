"""What DeepSpeed's engine allocates and sends in a step, by the rules of its source code (version 0.19)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from stratagem.planning.deepspeed_gathers import (
    GatherObserver,
    GatherRules,
    ParameterCoordinator,
    Releases,
    model_visits,
)
from stratagem.planning.ledger import EngineStep, Ledger
from stratagem.planning.timeline import Timeline, Visit

__all__ = ["Stage0", "Stage3", "Stages12", "ZeroJob", "ZeroOptions", "sub_groups"]

# Stages 1 and 2 pad the parameters of a group to a multiple of the number of ranks times this factor.
ALIGNMENT: Final = 2
# The most elements that stage 0 reduces at once.
_STAGE_0_BUCKET: Final = 500_000_000
_NORM_BYTES: Final = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroOptions:
    """The options of ``zero_optimization`` that change sizes, with DeepSpeed's defaults."""

    stage: int
    reduce_bucket_size: int
    contiguous_gradients: bool
    overlap_comm: bool
    reduce_scatter: bool
    multi_rank_bucket: bool
    sub_group_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    model_persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int

    @classmethod
    def parse(cls, stage: int, zero: Mapping[str, Any]) -> ZeroOptions:
        """Return the options of a configuration."""

        def number(name: str, default: float) -> int:
            return int(zero.get(name, zero.get(f"stage3_{name}", default)))

        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            reduce_bucket_size=number("reduce_bucket_size", 5e8),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            overlap_comm=stage == 3 if overlap is None else bool(overlap),
            reduce_scatter=bool(zero.get("reduce_scatter", True)),
            multi_rank_bucket=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
            sub_group_size=number("sub_group_size", 1e9),
            prefetch_bucket_size=number("prefetch_bucket_size", 5e7),
            persistence_threshold=number("param_persistence_threshold", 1e5),
            model_persistence_threshold=number("model_persistence_threshold", 2**63 - 1),
            max_live_parameters=number("max_live_parameters", 1e9),
            max_reuse_distance=number("max_reuse_distance", 1e9),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroJob:
    """What a step of DeepSpeed depends on.

    Attributes:
        options: the options of ZeRO.
        world: the number of ranks.
        itemsize: the bytes of an element in the dtype of the computation.
        groups: the indices of the trainable parameters of each group of the optimizer.
        numels: the number of elements of each parameter of the model.
        checks_overflow: whether DeepSpeed checks for overflows: in 16 bits, in stage 3 only in float16.
        offloads: whether the optimizer state is in the memory of the host.
        temporary: the temporary tensors of the optimizer's update.
    """

    options: ZeroOptions
    world: int
    itemsize: int
    groups: tuple[tuple[int, ...], ...]
    numels: tuple[int, ...]
    checks_overflow: bool
    offloads: bool
    temporary: int

    def group_of(self) -> dict[int, int]:
        return {index: number for number, group in enumerate(self.groups) for index in group}


class _DeepSpeedStep(EngineStep):
    def __init__(self, job: ZeroJob, ledger: Ledger, timeline: Timeline) -> None:
        super().__init__(ledger, timeline, job.world)
        self.job = job

    def _check_gradients(self, norms: Sequence[int]) -> None:
        """Count the collectives that clip gradients and, as a run does by default, check them for NaN and Inf."""
        self.sum_weights()
        if self.job.world > 1:
            self.ledger.send("all_reduce", _NORM_BYTES, self.job.world)
        if self.job.checks_overflow:
            self.ledger.send("all_reduce", 1, self.job.world)
        for nbytes in norms:
            self.ledger.send("all_reduce", nbytes, self.job.world)

    def _run_optimizer(self) -> None:
        if not self.job.offloads:
            self.ledger.add("temporary", self.job.temporary)
            self.ledger.add("temporary", -self.job.temporary)


@final
class Stage0(_DeepSpeedStep):
    """All ranks have all gradients, which are reduced after the last backward pass."""

    def __init__(self, job: ZeroJob, ledger: Ledger, timeline: Timeline) -> None:
        super().__init__(job, ledger, timeline)
        self._held: set[int] = set()

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        if parameter in self._held:
            self.ledger.add("gradients", -nbytes)
        self._held.add(parameter)

    def end_backward(self, *, last: bool) -> None:
        if not last:
            return
        self.ledger.phase = "update"
        sizes = [self.job.numels[index] for index in range(len(self.job.numels)) if index in self._held]
        for numel in _split(sizes, _STAGE_0_BUCKET):
            nbytes = numel * self.job.itemsize
            self.ledger.add("communication", nbytes)
            self.ledger.send("all_reduce", nbytes, self.job.world)
            self.ledger.add("communication", -nbytes)

    def update(self) -> None:
        self.sum_weights()
        numel = sum(self.job.numels[index] for index in self._held)
        copies = 4 * numel if self.job.itemsize < 4 else 0
        self.ledger.add("gradients", copies)
        self._run_optimizer()
        self.ledger.set("gradients", 0)


def _split(sizes: Iterable[int], most: int) -> list[int]:
    """Return the sums of consecutive sizes, each ending with the size that exceeds ``most``."""
    sums: list[int] = []
    current = 0
    for size in sizes:
        current += size
        if current > most:
            sums.append(current)
            current = 0
    return [*sums, current] if current else sums


@final
class Stages12(_DeepSpeedStep):
    """The gradients of a group are reduced in buckets; each rank keeps those of its range of the flattened parameters."""

    def __init__(self, job: ZeroJob, ledger: Ledger, timeline: Timeline) -> None:
        super().__init__(job, ledger, timeline)
        self._stage = job.options.stage
        self._reduces_early = self._stage == 2 or job.options.overlap_comm
        self._bucket: list[int] = []
        self._elements = 0
        self._buffer = 0
        self._held: dict[int, int] = {}
        self._group_of = job.group_of()
        self._starts, self._sizes = self._layout()
        self._own = {index for index in self._group_of if self._overlaps(index)[0][0] == 0}
        # The gradients of this rank: those of this micro-batch, and the sum of those before.
        self._partition = 0
        self._sum = 0

    def _layout(self) -> tuple[dict[int, int], list[int]]:
        """Return the first position of each parameter in its group, and the number of elements of a rank in each group."""
        starts: dict[int, int] = {}
        sizes = []
        multiple = ALIGNMENT * self.job.world
        for group in self.job.groups:
            position = 0
            for index in group:
                starts[index] = position
                position += self.job.numels[index]
            sizes.append(math.ceil(position / multiple) * multiple // self.job.world)
        return starts, sizes

    def _overlaps(self, index: int) -> list[tuple[int, int]]:
        """Return the ranks that update a parameter, each with its number of elements."""
        size = self._sizes[self._group_of[index]]
        first = self._starts[index]
        end = first + self.job.numels[index]
        if first == end:
            return [(first // size if size else 0, 0)]
        return [
            (rank, min(end, (rank + 1) * size) - max(first, rank * size))
            for rank in range(first // size, (end - 1) // size + 1)
        ]

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        options = self.job.options
        if not self._buffer and options.contiguous_gradients:
            self._buffer = options.reduce_bucket_size * self.job.itemsize * (2 if options.overlap_comm else 1)
            self.ledger.add("communication", self._buffer)
        if parameter in self._held:
            self.ledger.add("gradients", -nbytes)
        else:
            self._held[parameter] = nbytes
        if parameter in self._group_of and self._reduces_early and (last or self._stage == 2):
            self._put(parameter)

    def _put(self, parameter: int) -> None:
        """Move a gradient to the bucket."""
        numel = self.job.numels[parameter]
        if not numel:
            return
        if self._elements + numel > self.job.options.reduce_bucket_size:
            self._reduce()
        if self.job.options.contiguous_gradients and numel <= self.job.options.reduce_bucket_size:
            self.ledger.add("gradients", -self._held[parameter])
            self._held[parameter] = 0
        self._bucket.append(parameter)
        self._elements += numel

    def _reduce(self) -> None:
        if not self._bucket:
            return
        for numel, copied in self._messages():
            nbytes = numel * self.job.itemsize
            self.ledger.add("communication", nbytes if copied else 0)
            self.ledger.send("all_reduce", nbytes, self.job.world)
            self.ledger.add("communication", -nbytes if copied else 0)
        for parameter in self._bucket:
            if parameter in self._own and not self.job.offloads and not self._partition:
                self._partition = sum(self.job.numels[each] for each in self._own) * self.job.itemsize
                self.ledger.add("gradients", self._partition)
            if parameter in self._own or self._stage == 2:
                self.ledger.add("gradients", -self._held.pop(parameter, 0))
        self._bucket, self._elements = [], 0

    def _messages(self) -> list[tuple[int, bool]]:
        """Return the number of elements of each message of the bucket, and whether it is copied."""
        options = self.job.options
        if not options.reduce_scatter:
            return [(self._elements, False)]
        slices: list[tuple[int, int]] = []
        for parameter in self._bucket:
            for rank, numel in self._overlaps(parameter):
                if slices and slices[-1][0] == rank:
                    slices[-1] = (rank, slices[-1][1] + numel)
                else:
                    slices.append((rank, numel))
        messages: list[tuple[int, bool]] = []
        current: list[int] = []
        for _, numel in slices:
            current.append(numel)
            if sum(current) > options.reduce_bucket_size:
                messages.append((sum(current), len(current) > 1))
                current = []
        return [*messages, (sum(current), len(current) > 1)] if current else messages

    def end_backward(self, *, last: bool) -> None:
        self.ledger.phase = "update"
        if not (last or self._stage == 2):
            return
        if not self._reduces_early:
            for group in self.job.groups:
                for parameter in group:
                    if parameter in self._held:
                        self._put(parameter)
        self._reduce()
        if self._sum:
            self.ledger.add("gradients", -self._partition)
        else:
            self._sum = self._partition
        self._partition = 0
        self.ledger.add("communication", -self._buffer)
        self._buffer = 0
        self.ledger.add("gradients", -sum(self._held.values()))
        self._held = {}
        self.ledger.phase = "backward"

    def update(self) -> None:
        self._check_gradients([_NORM_BYTES] * len(self.job.groups))
        partition = sum(self._sizes)
        if not self.job.offloads:
            # A flat copy in the dtype of the gradients is converted to float32; with float32, it is not copied again.
            self.ledger.add("gradients", 4 * partition)
            if self.job.itemsize < 4:
                self.ledger.add("gradients", self.job.itemsize * partition)
                self.ledger.add("gradients", -self.job.itemsize * partition)
            self.ledger.add("gradients", -self._sum)
            self._sum = 0
            self._run_optimizer()
            self.ledger.set("gradients", 0)
        if self.job.world > 1:
            for size in self._sizes:
                self.ledger.send("all_gather", size * self.job.world * self.job.itemsize, self.job.world)


def sub_groups(numels: Sequence[int], world: int, largest: int) -> list[int]:
    """Return the number of elements of a rank in each sub-group of stage 3, which is updated at once."""
    counts: list[int] = []
    current = 0
    for index, numel in enumerate(numels):
        current += math.ceil(numel / world)
        if current >= largest or index == len(numels) - 1:
            counts.append(current)
            current = 0
    return counts


@final
class Stage3(_DeepSpeedStep, GatherObserver):
    """Each parameter is divided among the ranks, and gathered before the modules that use it.

    Args:
        job: the engine.
        ledger: the record of the step.
        timeline: a micro-batch of the model.
        rules: when parameters are gathered and released.
        releases: the decisions of ``first_releases``.
    """

    def __init__(
        self, job: ZeroJob, ledger: Ledger, timeline: Timeline, rules: GatherRules, releases: Releases
    ) -> None:
        super().__init__(job, ledger, timeline)
        self._persistent = rules.persistent
        visits = model_visits(timeline)
        self._first = visits[0] if visits else None
        self._is_running = False
        self._bucket: list[int] = []
        self._held: dict[int, int] = {}
        self._gathers = ParameterCoordinator(rules, visits, self, releases)
        self._gathers.end_step()

    # ---- gathering --------------------------------------------------------------------------------------------------

    def _share(self, parameter: int) -> int:
        return math.ceil(self.job.numels[parameter] / self.job.world)

    def _full_bytes(self, parameters: Iterable[int]) -> int:
        return sum(map(self._share, parameters)) * self.job.world * self.job.itemsize

    def visit(self, visit: Visit) -> None:
        self._is_running = self._is_running or visit is self._first
        if self._is_running:
            self._gathers.visit(visit)

    # With one rank, parameters are views of the partitions.

    def on_gather(self, parameters: Sequence[int]) -> None:
        if self.job.world > 1:
            self.ledger.send("all_gather", self._full_bytes(parameters), self.job.world)
            self.ledger.add("communication", self._full_bytes(parameters))

    def on_arrival(self, parameters: Sequence[int]) -> None:
        if self.job.world > 1:
            for each in parameters:
                self.ledger.add("gathered parameters", self._full_bytes([each]))
            self.ledger.add("communication", -self._full_bytes(parameters))

    def on_release(self, parameter: int) -> None:
        if self.job.world > 1:
            self.ledger.add("gathered parameters", -self._full_bytes([parameter]))

    def carried(self) -> Hashable:
        return self._gathers.available

    # ---- gradients --------------------------------------------------------------------------------------------------

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        size = self.job.options.reduce_bucket_size
        numel = self.job.numels[parameter]
        elements = sum(self.job.numels[each] for each in self._bucket)
        if self._bucket and elements + numel > size:
            self._reduce()
            elements = 0
        self._held[parameter] = nbytes
        if self.job.options.contiguous_gradients and elements + numel <= size:
            self.ledger.add("gradients", -nbytes)
            self._held[parameter] = 0
        self._bucket.append(parameter)

    def _reduce(self) -> None:
        if not self._bucket:
            return
        numels = [self.job.numels[each] for each in self._bucket]
        contiguous = self.job.options.contiguous_gradients and sum(numels) <= self.job.options.reduce_bucket_size
        if contiguous and not self.job.options.reduce_scatter:
            self.ledger.send("all_reduce", sum(numels) * self.job.itemsize, self.job.world)
        else:
            nbytes = sum(map(self._share, self._bucket)) * self.job.world * self.job.itemsize
            copied = nbytes if len(numels) > 1 or numels[0] % self.job.world else 0
            self.ledger.add("communication", copied)
            self.ledger.send("reduce_scatter", nbytes, self.job.world)
            self.ledger.add("communication", -copied)
        for each in self._bucket:
            self.ledger.add("gradients", -self._held.pop(each))
        self._bucket = []

    def end_backward(self, *, last: bool) -> None:
        self.ledger.phase = "update"
        self._reduce()
        self._gathers.end_backward()
        if last:
            self._gathers.end_step()
        else:
            self._gathers.begin_forward()
        self._is_running = False

    def update(self) -> None:
        counts = [
            count
            for group in self.job.groups
            for count in sub_groups(
                [self.job.numels[each] for each in group], self.job.world, self.job.options.sub_group_size
            )
        ]
        self._check_gradients([4 if self.job.offloads else 8] * len(counts))
        if not self.job.offloads:
            for count in counts:
                # A flat copy in the dtype of the gradients is converted to float32; with float32, it is not copied again.
                flat = self.job.itemsize * count if self.job.itemsize < 4 else 0
                self.ledger.add("gradients", flat)
                self.ledger.add("gradients", 4 * count)
                self.ledger.add("gradients", -flat)
                self._run_optimizer()
                self.ledger.add("gradients", -4 * count)
        if self.job.world > 1:
            for each in sorted(self._persistent):
                self.ledger.send("all_gather", self._full_bytes([each]), self.job.world)
