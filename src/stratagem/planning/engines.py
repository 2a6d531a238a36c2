"""Plan engines, whose code cannot run with fake tensors: their rules are applied to a simulated micro-batch of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratagem.errors import PlacementError
from stratagem.planning.batch import BatchSpec
from stratagem.planning.ledger import EngineStep, Ledger, replay
from stratagem.planning.result import CONTEXT_BYTES, MemoryPlan, StepPlan
from stratagem.planning.search import largest_of_profiles
from stratagem.planning.simulate import Job
from stratagem.planning.timeline import Timeline
from stratagem.planning.timelines import Timelines
from stratagem.planning.trace import StepTrace, storage_bytes
from stratagem.planning.update_reads import UpdateReads
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["EngineRequest", "EngineStatic", "batch_bytes", "finish", "state_bytes"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What is planned.

    Attributes:
        job: the model and the optimizer.
        timelines: its micro-batches.
        limits: the memory of the devices.
        average: the hook that averages weights, if any.
    """

    job: Job
    timelines: Timelines
    limits: tuple[int | None, ...]
    average: EMAHook | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatic:
    """What an engine keeps, and how it replays a step.

    Attributes:
        memory: the plan without activations and peak.
        buckets: buffers for communication that exist during the whole run.
        resting_gradients: the gradients that exist between steps.
        dtype: the dtype that the model is cast to.
        keeps_buffers: whether the buffers keep their dtype.
        tp_size: the number of ranks that layers are sharded across.
        accumulation: the number of micro-batches in a step.
        make: returns the replay of a step.
    """

    memory: MemoryPlan
    buckets: int
    resting_gradients: int
    dtype: torch.dtype | None
    accumulation: int
    keeps_buffers: bool = False
    tp_size: int = 1
    make: Callable[[Ledger, Timeline], EngineStep]


def finish(request: EngineRequest, base: StepPlan, static: EngineStatic, note: str) -> list[StepPlan]:
    """Return the plans of an engine for each limit: with activations, peak and collectives if a micro-batch can be simulated."""
    timeline = request.timelines.get(static.dtype, keeps_buffers=static.keeps_buffers, tp_size=static.tp_size)
    if isinstance(timeline, str):
        failed = replace(base, memory=static.memory, notes=(*base.notes, note), failure=timeline, simulated=False)
        return [replace(failed, memory_limit=limit) for limit in request.limits]
    ledger = _replayed(static, timeline, base)
    memory = replace(
        static.memory,
        activations=timeline.saved,
        peak=max(ledger.totals),
        at_peak={kind: size for kind, size in ledger.at_peak.items() if size},
        peak_phase=ledger.peak_phase,
        transient={
            **{
                kind: ledger.most[kind]
                for kind in ("gathered parameters", "communication", "temporary")
                if ledger.most[kind]
            },
            "largest tensor": timeline.largest,
        },
    )
    planned = replace(
        base,
        memory=memory,
        collectives=ledger.collectives(),
        flops=timeline.flops * static.accumulation,
        compute_dtype=timeline.compute_dtype,
        simulated=False,
        notes=(*base.notes, note),
    )
    largest = _largest(request, static, base)
    return [
        replace(planned, memory_limit=limit, largest_micro_batch=largest[limit] if limit is not None else None)
        for limit in request.limits
    ]


def _replayed(static: EngineStatic, timeline: Timeline, base: StepPlan) -> Ledger:
    memory = static.memory
    ledger = Ledger(
        {
            "parameters": memory.parameters,
            "gradients": static.resting_gradients,
            "optimizer state": memory.optimizer_state,
            "master weights": memory.master_weights,
            "averaged weights": memory.ema,
            "buffers": memory.buffers,
            "batch": timeline.batch,
            "communication": static.buckets,
        },
        base.gpus_per_node,
    )
    replay(timeline, static.make(ledger, timeline), static.accumulation)
    return ledger


def _largest(request: EngineRequest, static: EngineStatic, base: StepPlan) -> dict[int, int | None]:
    batch = request.timelines.batch
    limits = [limit for limit in request.limits if limit is not None]
    if batch is None or batch.size is None or not limits:
        return dict.fromkeys(limits)

    def totals(size: int) -> list[int]:
        timeline = request.timelines.get(
            static.dtype, keeps_buffers=static.keeps_buffers, tp_size=static.tp_size, size=size
        )
        if isinstance(timeline, str):
            raise PlacementError(timeline)
        return _replayed(static, timeline, base).totals

    found = largest_of_profiles(totals, [limit - CONTEXT_BYTES for limit in limits], batch.size)
    return dict(zip(limits, found, strict=True))


def batch_bytes(batch: BatchSpec) -> int:
    """Return the bytes of the tensors of a batch."""
    return sum(each.nbytes for each in tree_leaves(batch.batch) if isinstance(each, Tensor))


def state_bytes(optimizer: Any, updated: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    """Return the size of the state that an optimizer creates for other tensors than its own, and of its temporary tensors."""
    for group, tensors in zip(optimizer.param_groups, updated, strict=True):
        group["params"] = [nn.Parameter(each) for each in tensors]
        for each in group["params"]:
            each.grad = torch.empty_like(each)
    optimizer.state.clear()
    with UpdateReads():
        optimizer.step()
    state = [each for each in tree_leaves(dict(optimizer.state)) if isinstance(each, Tensor)]
    state = [each for each in state if not isinstance(each, nn.Parameter)]
    owned = [each for group in optimizer.param_groups for each in group["params"]]
    known: Mapping[str, list[Tensor]] = {
        "parameters": owned,
        "gradients": [each.grad for each in owned],
        "optimizer state": state,
    }
    trace = StepTrace(known)
    with trace, UpdateReads():
        optimizer.step()
    totals = trace.history().running_totals()
    return storage_bytes(state), max(totals) - totals[0]
