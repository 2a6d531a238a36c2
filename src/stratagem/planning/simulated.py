"""Plan strategies whose code runs with fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from torch import Tensor
from torch.utils._pytree import tree_leaves

from stratagem.parallel.deferred_init.materialize import CHUNK_BYTES
from stratagem.planning.batch import BatchSpec
from stratagem.planning.failures import describe_failure
from stratagem.planning.repeated_blocks import (
    RepeatedBlocks,
    agree,
    extended,
    extended_history,
    names_blocks,
    with_more_samples,
)
from stratagem.planning.result import CONTEXT_BYTES, Collective, MemoryPlan, StepPlan
from stratagem.planning.search import largest_of_profiles
from stratagem.planning.simulate import Job, Simulation, StepRecord, simulating
from stratagem.planning.snapshot import Snapshot, snapshot
from stratagem.planning.storage_history import StorageHistory, interpolated_history
from stratagem.planning.timelines import Timelines
from stratagem.planning.trace import storage_bytes
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["PlanRequest", "plan_simulated"]

# The kinds of tensors that ``cpu_offload`` keeps in the memory of the host.
_ON_HOST: Final = ("parameters", "gradients", "optimizer state")
_OFFLOAD_NOTE: Final = (
    "The time of a step does not include the update on the CPU and the copies between CPU and device."
)
# The numbers of blocks from which a model with many equal blocks is planned; the last one checks what follows from the others.
_FEW_BLOCKS: Final = (2, 3, 4)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is planned.

    Attributes:
        job: the model and the optimizer.
        batch: the batch of a rank; None if it is unknown.
        ranks_per_node: the number of ranks on a node.
        memory_limits: the memory of each device.
        timelines: the micro-batches of the model, and its equal blocks.
        average: the hook that averages the weights, if any.
    """

    job: Job
    batch: BatchSpec | None
    ranks_per_node: int
    memory_limits: tuple[int | None, ...]
    timelines: Timelines
    average: EMAHook | None = None


def plan_simulated(request: PlanRequest, strategy: Mapping[str, Any], base: StepPlan) -> list[StepPlan]:
    """Return the plans of a strategy for each memory limit.

    Args:
        request: what is planned.
        strategy: the configuration of the strategy.
        base: the plan without sizes.

    Raises:
        StratagemError: (a subclass) if the strategy refuses this model or this number of ranks.
    """
    planned = _plan_from_few_blocks(request, strategy, base)
    if planned is not None:
        return planned
    planned, failed = _try_plan(request, strategy, base)
    if failed is not None:
        # The failed step may have left gathered parameters, so the static sizes are those of a new simulation.
        planned, _ = _try_plan(replace(request, batch=None), strategy, base, failed)
    return planned


def _try_plan(
    request: PlanRequest,
    strategy: Mapping[str, Any],
    base: StepPlan,
    failure: str | None = "Without a batch, no step was simulated.",
) -> tuple[list[StepPlan], str | None]:
    """Return the plans of a strategy, or why its step could not be simulated.

    Args:
        request: what is planned; without a batch, no step is simulated.
        strategy: the configuration of the strategy.
        base: the plan without sizes.
        failure: why there is no batch.
    """
    with simulating(request.job, strategy, base.world, ranks_per_node=request.ranks_per_node) as sim:
        batch = request.batch
        if batch is None:
            sizes = snapshot(sim, None, request.average)
            return _finished(request, sizes, replace(base, failure=failure), None), None
        try:
            record = sim.step(batch.batch)
        except Exception as error:  # noqa: BLE001 -- the user's model may raise anything
            return [], describe_failure(error, type(sim.model).__name__, sparse=bool(sim.sparse_parameters()))

        def history(size: int) -> StorageHistory:
            return sim.step(batch.resized(size)).history

        # The search changes the size of the batch, so it comes after everything that reads the recorded step.
        return _finished(request, snapshot(sim, record, request.average), base, history), None


def _plan_from_few_blocks(request: PlanRequest, strategy: Mapping[str, Any], base: StepPlan) -> list[StepPlan] | None:
    """Return the plans of a model with many equal blocks; None if they do not follow from models with a few of them."""
    blocks = None if names_blocks(base.options) else request.timelines.repeated_blocks()
    if blocks is None or request.batch is None:
        return None
    try:
        return _Few(request, request.batch, strategy, base, blocks).plan()
    except Exception:  # noqa: BLE001 -- simulating the whole model reports what is wrong
        return None


@final
class _Few:
    """Simulations of a model with a few blocks."""

    def __init__(
        self,
        request: PlanRequest,
        batch: BatchSpec,
        strategy: Mapping[str, Any],
        base: StepPlan,
        blocks: RepeatedBlocks,
    ) -> None:
        self._request = request
        self._batch = batch
        self._strategy = strategy
        self._base = base
        self._blocks = blocks
        self._known: dict[tuple[int, int], StorageHistory] = {}
        # The first of the sizes of batches from which all larger ones follow.
        self._first = max(2, batch.size or 0)
        self._is_linear = False

    def plan(self) -> list[StepPlan] | None:
        """Return the plans for each memory limit; None if the sizes do not follow from a few blocks."""
        request = self._request
        searches = self._batch.size is not None and any(request.memory_limits)
        found: list[Snapshot] = []
        for keep, times in zip(_FEW_BLOCKS, ((1,), (1, 2), (3,)), strict=True):
            with self._simulating(keep) as sim:
                record = sim.step(self._batch.batch)
                found.append(snapshot(sim, record, request.average))
                self._known[keep, self._batch.size or 0] = record.history
                searches = searches and not self._is_too_large(found)
                if searches:
                    self._note(sim, keep, times)
        short, long, check = found
        predicted = extended(short, long, 1)
        if predicted is None or not agree(predicted, check):
            return None
        self._is_linear = searches and self._grows_linearly()
        whole = extended(short, long, self._blocks.count - _FEW_BLOCKS[1])
        return None if whole is None else _finished(request, whole, self._base, self._history)

    def _is_too_large(self, found: Sequence[Snapshot]) -> bool:
        """Return whether a batch of one sample fits no limit, judging by two and three blocks."""
        limits = [limit for limit in self._request.memory_limits if limit is not None]
        if self._batch.size != 1 or len(found) < 2 or self._base.options.get("cpu_offload"):
            return False
        whole = extended(found[0], found[1], self._blocks.count - _FEW_BLOCKS[1])
        if whole is None or whole.step is None:
            return False
        return whole.step.history.peak().nbytes + whole.averages + CONTEXT_BYTES > max(limits)

    def _simulating(self, keep: int) -> Any:
        job = self._request.timelines.finder.shortened(self._blocks, keep)
        return simulating(job, self._strategy, self._base.world, ranks_per_node=self._request.ranks_per_node)

    def _note(self, sim: Simulation, keep: int, times: Sequence[int]) -> None:
        """Note the storages of steps with multiples of the first size."""
        for size in (each * self._first for each in times):
            if (keep, size) not in self._known:
                self._known[keep, size] = sim.step(self._batch.resized(size)).history

    def _grows_linearly(self) -> bool:
        """Return whether a step with more blocks and more samples follows from the others."""
        few, middle, last = _FEW_BLOCKS
        low = self._first
        larger = with_more_samples(self._known[few, low], self._known[middle, low], self._known[middle, 2 * low])
        if larger is None:
            return False
        self._known[few, 2 * low] = larger
        short, long = (self._between(keep, 3 * low) for keep in (few, middle))
        expected = None if short is None or long is None else extended_history(short, long, last - middle)
        if expected == self._known[last, 3 * low]:
            return True
        del self._known[few, 2 * low]
        return False

    def _between(self, keep: int, size: int) -> StorageHistory | None:
        low, high = (self._known[keep, times * self._first] for times in (1, 2))
        return interpolated_history(low, high, (size - self._first) / self._first)

    def _history(self, size: int) -> StorageHistory:
        few = _FEW_BLOCKS[:2]
        parts = [self._between(keep, size) if self._is_linear and size >= self._first else None for keep in few]
        for index, keep in enumerate(few):
            if parts[index] is None and (keep, size) not in self._known:
                with self._simulating(keep) as sim:
                    self._known[keep, size] = sim.step(self._batch.resized(size)).history
        short, long = (part or self._known[keep, size] for part, keep in zip(parts, few, strict=True))
        whole = extended_history(short, long, self._blocks.count - few[1])
        if whole is None:
            raise ValueError("the storages of a larger batch do not follow from a few blocks")
        return whole


def _finished(
    request: PlanRequest, sizes: Snapshot, base: StepPlan, history: Callable[[int], StorageHistory] | None
) -> list[StepPlan]:
    """Return the plan with the sizes of a simulation, for each memory limit.

    Args:
        request: what is planned.
        sizes: the sizes.
        base: the plan without sizes.
        history: returns the storages of a step with another size of the batch.
    """
    record = sizes.step
    offload = bool(base.options.get("cpu_offload"))
    memory = _memory(request, sizes, offload=offload)
    # Rank 0 writes all that it has; of tensors that several ranks have, the others write nothing.
    memory = replace(memory, host={"asynchronous save": sizes.own_checkpoint, **memory.host})
    largest = _largest_micro_batches(request, sizes, history, offload=offload)
    planned = replace(
        base,
        dp_size=sizes.dp_size,
        accumulation=sizes.accumulation,
        memory=memory,
        collectives=() if record is None else _collectives(record, request.ranks_per_node),
        flops=None if record is None else record.flops,
        compute_dtype="float32" if record is None else record.main_dtype,
        checkpoint_bytes=sizes.checkpoint,
        resume_bytes=sizes.own_checkpoint + math.ceil(sizes.checkpoint / base.world),
        notes=(*sizes.notes, *((_OFFLOAD_NOTE,) if offload else ())),
    )
    return [
        replace(planned, memory_limit=limit, largest_micro_batch=None if limit is None else largest.get(limit))
        for limit in request.memory_limits
    ]


def _memory(request: PlanRequest, sizes: Snapshot, *, offload: bool) -> MemoryPlan:
    record = sizes.step
    static = {
        "parameters": sizes.parameters,
        "gradients": sizes.gradients,
        "optimizer state": sizes.optimizer_state,
    }
    host: dict[str, int] = {}
    peak = None if record is None else record.history.peak()
    at_peak: dict[str, int] = {}
    if peak is not None:
        at_peak = {kind: size for kind, size in peak.by_kind.items() if not (offload and kind in _ON_HOST)}
        at_peak |= {"averaged weights": sizes.averages} if sizes.averages else {}
        if sizes.state_excess and not offload:
            at_peak["optimizer state"] = at_peak.get("optimizer state", 0) + sizes.state_excess
    if offload:
        host.update(static)
        static = dict.fromkeys(static, 0)
    transient = {}
    if record is not None:
        most = record.history.largest_by_kind()
        kinds = ("gathered parameters", "communication", "temporary")
        transient = {kind: most[kind] for kind in kinds if most.get(kind)}
        transient["largest tensor"] = record.largest
    if sizes.is_sharded:
        transient["loading"] = min(CHUNK_BYTES, sizes.largest_parameter)
    return MemoryPlan(
        parameters=static["parameters"],
        gradients=static["gradients"],
        optimizer_state=static["optimizer state"],
        ema=sizes.averages,
        buffers=sizes.buffers,
        batch=0 if request.batch is None else storage_bytes(_tensors(request.batch.batch)),
        activations=None if record is None else record.activations,
        peak=None if peak is None else sum(at_peak.values()),
        at_peak=at_peak,
        peak_phase=None if peak is None else peak.phase,
        transient=transient,
        host=host,
    )


def _tensors(batch: Any) -> list[Tensor]:
    return [each for each in tree_leaves(batch) if isinstance(each, Tensor)]


def _collectives(record: StepRecord, ranks_per_node: int) -> tuple[Collective, ...]:
    groups: dict[tuple[str, int, int, str], list[int]] = {}
    for call in record.calls:
        near = sum(rank // ranks_per_node == call.ranks[0] // ranks_per_node for rank in call.ranks)
        groups.setdefault((call.kind, len(call.ranks), near, call.phase), []).append(call.nbytes)
    return tuple(
        Collective(kind=kind, count=len(sizes), bytes=sum(sizes), group_size=size, ranks_per_node=near, phase=phase)
        for (kind, size, near, phase), sizes in groups.items()
    )


def _largest_micro_batches(
    request: PlanRequest, sizes: Snapshot, history: Callable[[int], StorageHistory] | None, *, offload: bool
) -> dict[int, int]:
    """Return the largest micro-batch for each memory limit; nothing without a batch whose samples are known."""
    batch = request.batch
    limits = [limit for limit in request.memory_limits if limit is not None]
    if batch is None or batch.size is None or history is None or sizes.step is None or not limits:
        return {}
    on_host = _ON_HOST if offload else ()
    known = {batch.size: sizes.step.history.running_totals(on_host)}

    def totals(size: int) -> Sequence[int]:
        if size not in known:
            known[size] = history(size).running_totals(on_host)
        return known[size]

    fixed = sizes.averages + CONTEXT_BYTES + (0 if offload else sizes.state_excess or 0)
    found = largest_of_profiles(totals, [limit - fixed for limit in limits], batch.size)
    return dict(zip(limits, found, strict=True))
