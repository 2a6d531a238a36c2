"""Plan ``DeepSpeedStrategy``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from stratagem.errors import PlacementError
from stratagem.planning.deepspeed import ALIGNMENT, Stage0, Stage3, Stages12, ZeroJob, ZeroOptions, sub_groups
from stratagem.planning.deepspeed_gathers import GatherRules, Releases, first_releases, model_visits
from stratagem.planning.engines import EngineRequest, EngineStatic, batch_bytes, finish, state_bytes
from stratagem.planning.fake_world import fake_copies, new_fake_mode
from stratagem.planning.ledger import EngineStep, Ledger
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.timeline import Timeline, Visit
from stratagem.planning.trace import storage_bytes
from stratagem.strategies.base import require_master_weights
from stratagem.strategies.setup.building import build_optim_wrapper
from stratagem.utils import import_object

__all__ = ["plan_deepspeed"]

_NOTE: Final = "Computed by the rules of DeepSpeed from a simulated forward and backward pass. The peak is an estimate."


def plan_deepspeed(request: EngineRequest, base: StepPlan) -> list[StepPlan]:
    """Return the plans of ``DeepSpeedStrategy`` for each memory limit.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
        PlacementError: if parameters are offloaded, or DeepSpeed does not support the optimizer.
    """
    options, optim_wrapper = import_object("stratagem.engines.deepspeed.strategy:parse_for_plan")(
        base.options, request.job.optim_wrapper
    )
    section = options.config.get("zero_optimization", {})
    if section.get("offload_param"):
        raise PlacementError("Planning does not support offload_param of DeepSpeed. Omit it, or use FSDPStrategy.")
    if request.average is not None:
        require_master_weights("DeepSpeedStrategy", available=options.params_are_master_weights)
    zero = ZeroOptions.parse(options.stage, section)
    # Outside of the mode, because the constructor may read values of tensors.
    model = request.job.make_model()
    with new_fake_mode() as mode:
        fake_copies(mode, model, torch.device("cpu"))
        wrapper: Any = build_optim_wrapper(optim_wrapper, model)
        import_object("stratagem.engines.deepspeed.elementwise_check:require_elementwise")(
            wrapper.optimizer, stage=options.stage, allow_unknown=options.allows_unknown_optimizers
        )
        groups = [[each for each in group["params"] if each.requires_grad] for group in wrapper.optimizer.param_groups]
        averages = [] if request.average is None else list(request.average.build_average(model).averages.values())
        numels = tuple(each.numel() for each in model.parameters())
        updated, at_rest, gradients = _layout(groups, options, zero, base.world)
        state, temporary = state_bytes(wrapper.optimizer, updated)
        masters = 4 * sum(each.numel() for group in updated for each in group)
        itemsize = _item_size(options)
        frozen = [each.numel() for each in model.parameters() if not each.requires_grad]
        saved = sum(each.nbytes for each in (*model.state_dict().values(), *averages))
        index = {id(each): number for number, each in enumerate(model.parameters())}
        indices = tuple(tuple(index[id(each)] for each in group) for group in groups)
        largest = max((each.numel() for group in groups for each in group), default=0)
    persistent = _persistent(zero, numels)
    at_rest += itemsize * _untrained(zero, frozen, [numels[each] for each in persistent], base.world)
    owns_masters = options.stage > 0 or options.dtype is not None
    partitions = sum(each.numel() for group in updated for each in group)
    sizes = {"gradients": gradients, "optimizer state": state, "master weights": masters if owns_masters else 0}
    host = {"asynchronous save": at_rest + sum(sizes.values()) - gradients}
    buckets = 0
    if options.stage == 3 and zero.contiguous_gradients:
        buckets += zero.reduce_bucket_size * itemsize
    if options.offloads_optimizer:
        host.update(sizes)
        sizes = dict.fromkeys(sizes, 0)
        if options.stage in (1, 2):
            # Gradients of one parameter at a time pass through a buffer on the device and one in the memory of the host, which
            # also has the updated range before it is copied to the device.
            buckets += largest * itemsize
            host["copies for updates"] = (largest + partitions) * itemsize
    memory = MemoryPlan(
        parameters=at_rest,
        gradients=sizes["gradients"],
        optimizer_state=sizes["optimizer state"],
        master_weights=sizes["master weights"],
        ema=storage_bytes(averages),
        buffers=storage_bytes(model.buffers()),
        batch=0 if request.timelines.batch is None else batch_bytes(request.timelines.batch),
        host=host,
    )
    job = ZeroJob(
        options=zero,
        world=base.world,
        itemsize=itemsize,
        groups=tuple(group for group in indices if group),
        numels=numels,
        checks_overflow=options.dtype == torch.float16 or (options.dtype is not None and options.stage < 3),
        offloads=options.offloads_optimizer,
        temporary=temporary,
    )
    static = EngineStatic(
        memory=memory,
        buckets=buckets,
        resting_gradients=partitions * itemsize if options.stage == 3 and not options.offloads_optimizer else 0,
        dtype=options.dtype,
        keeps_buffers=True,
        accumulation=int(wrapper.accumulative_counts),
        make=_step_of(job, persistent, int(wrapper.accumulative_counts)),
    )
    base = replace(
        base,
        accumulation=static.accumulation,
        checkpoint_bytes=saved + state * (base.world if options.stage else 1),
        compute_dtype=str(options.dtype or torch.float32).removeprefix("torch."),
    )
    return finish(request, base, static, _NOTE)


def _step_of(job: ZeroJob, persistent: frozenset[int], accumulation: int) -> Callable[[Ledger, Timeline], EngineStep]:
    # The search for the largest micro-batch replays the same visits with other sizes.
    known: dict[tuple[Visit, ...], Releases] = {}

    def make(ledger: Ledger, timeline: Timeline) -> EngineStep:
        if job.options.stage == 0:
            return Stage0(job, ledger, timeline)
        if job.options.stage < 3:
            return Stages12(job, ledger, timeline)
        rules = GatherRules(
            numels=job.numels,
            modules=timeline.modules,
            persistent=persistent,
            prefetch_bucket_size=job.options.prefetch_bucket_size,
            max_live_parameters=job.options.max_live_parameters,
            max_reuse_distance=job.options.max_reuse_distance,
        )
        visits = model_visits(timeline)
        if visits not in known:
            known[visits] = first_releases(rules, visits, accumulation)
        return Stage3(job, ledger, timeline, rules, known[visits])

    return make


def _item_size(options: Any) -> int:
    return 4 if options.dtype is None else int(options.dtype.itemsize)


def _persistent(zero: ZeroOptions, numels: Sequence[int]) -> frozenset[int]:
    """Return the parameters that stage 3 keeps on all ranks, even if they are frozen."""
    chosen: set[int] = set()
    total = 0
    for index, numel in enumerate(numels):
        if numel + total <= zero.model_persistence_threshold and numel <= zero.persistence_threshold:
            chosen.add(index)
            total += numel
    return frozenset(chosen)


def _untrained(zero: ZeroOptions, frozen: Sequence[int], persistent: Sequence[int], world: int) -> int:
    """Return the elements of frozen parameters, and of those that stage 3 keeps on all ranks in addition to their shares.

    Args:
        zero: the options of ZeRO.
        frozen: the number of elements of each frozen parameter.
        persistent: the number of elements of each parameter that stage 3 keeps on all ranks.
        world: the number of ranks.
    """
    if zero.stage < 3:
        return sum(frozen)
    shares = sum(math.ceil(numel / world) for numel in frozen)
    # With a single rank, the parameters are views of the partitions.
    return shares + (sum(math.ceil(numel / world) * world for numel in persistent) if world > 1 else 0)


def _layout(
    groups: Sequence[Sequence[Tensor]], options: Any, zero: ZeroOptions, world: int
) -> tuple[list[list[Tensor]], int, int]:
    """Return the tensors that the optimizer of a rank updates, by group, and the bytes of these parameters and their gradients.

    The parameters that stage 3 keeps on all ranks are not included.
    """
    size = _item_size(options)
    if options.stage == 0:
        numel = sum(each.numel() for group in groups for each in group)
        # In half precision, the optimizer reads copies of the gradients in float32.
        gradients = numel * 4 if options.dtype is None else numel * (size + 4)
        return [[torch.empty_like(each) for each in group] for group in groups], numel * size, gradients
    if options.stage < 3:
        multiple = ALIGNMENT * world
        padded = [math.ceil(sum(each.numel() for each in group) / multiple) * multiple for group in groups]
        updated = [[torch.empty(count // world)] if count else [] for count in padded]
        return updated, sum(padded) * size, _flat_gradients(groups, padded, world, exact=options.dtype is None)
    updated = [
        [torch.empty(count) for count in sub_groups([each.numel() for each in group], world, zero.sub_group_size)]
        for group in groups
    ]
    partitions = sum(each.numel() for group in updated for each in group)
    # Gradients are collected in a buffer in the dtype of the computation, and copied to float32 for the update.
    return updated, partitions * size, partitions * (size + 4)


def _flat_gradients(groups: Sequence[Sequence[Tensor]], padded: Sequence[int], world: int, *, exact: bool) -> int:
    """Return the bytes of the gradients that the optimizer of the rank with the most reads in stages 1 and 2.

    Args:
        groups: the parameters of each group.
        padded: the number of elements of each group.
        world: the number of ranks.
        exact: whether gradients have the dtype of the optimizer. A range within a single parameter is then not copied, and keeps
            the gradients of all parameters of which the rank updates a part.
    """
    copies = sum(padded) // world * 4
    if not exact:
        return copies
    most = copies
    owned: dict[int, list[int]] = {}
    within: dict[int, int] = {}
    for group, total in zip(groups, padded, strict=True):
        size = total // world
        position = 0
        for each in group:
            end = position + each.numel()
            for rank in range(position // size, (end - 1) // size + 1) if each.numel() else ():
                owned.setdefault(rank, []).append(each.numel())
                if position <= rank * size and end >= (rank + 1) * size:
                    within[rank] = within.get(rank, 0) + size
            position = end
    for rank, elements in within.items():
        most = max(most, copies + 4 * (sum(owned[rank]) - elements))
    return most
