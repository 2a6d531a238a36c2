"""The static sizes of engines that are computed by their partitioning rules, because their code cannot run with fake tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratagem.errors import PlacementError
from stratagem.planning.fake_world import fake_copies, new_fake_mode
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.simulate import Job
from stratagem.planning.trace import storage_bytes
from stratagem.strategies.setup.building import build_optim_wrapper
from stratagem.utils import import_object

__all__ = ["plan_deepspeed"]

# ZeRO 1 and 2 pad the parameters of a group to a multiple of the number of ranks times this factor.
_ALIGNMENT: Final = 2
# DeepSpeed's defaults for stage 3.
_PERSISTENCE_THRESHOLD: Final = 100_000
_SUB_GROUP_SIZE: Final = 1_000_000_000
_NOTE: Final = (
    "Computed by the partitioning rules of DeepSpeed, without activations, buckets and collectives, because its engine cannot "
    "run with fake tensors."
)


def plan_deepspeed(job: Job, base: StepPlan, batch_bytes: int) -> StepPlan:
    """Return the plan of ``DeepSpeedStrategy`` with static sizes.

    Args:
        job: what is planned.
        base: the plan without sizes, with the options of the strategy.
        batch_bytes: the size of the batch.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
        PlacementError: if parameters are offloaded.
    """
    options, optim_wrapper = import_object("stratagem.engines.deepspeed.strategy:parse_for_plan")(
        base.options, job.optim_wrapper
    )
    zero = options.config.get("zero_optimization", {})
    if zero.get("offload_param"):
        raise PlacementError("Planning does not support offload_param of DeepSpeed. Omit it, or use FSDPStrategy.")
    with new_fake_mode() as mode:
        model = job.make_model()
        fake_copies(mode, model, torch.device("cpu"))
        wrapper: Any = build_optim_wrapper(optim_wrapper, model)
        groups = [[each for each in group["params"] if each.requires_grad] for group in wrapper.optimizer.param_groups]
        updated, at_rest, gradients = _layout(groups, options, zero, base.world)
        state = _state_bytes(wrapper.optimizer, updated)
        masters = 4 * sum(each.numel() for group in updated for each in group)
        frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
        buffers = storage_bytes(model.buffers())
        checkpoint = sum(each.nbytes for each in model.state_dict().values()) + state * (
            base.world if options.stage else 1
        )
        accumulation = int(wrapper.accumulative_counts)
    owns_masters = options.stage > 0 or options.dtype is not None
    sizes = {
        "gradients": gradients,
        "optimizer state": state,
        "master weights": masters if owns_masters else 0,
    }
    host = {"asynchronous save": at_rest + sum(sizes.values()) - gradients}
    if options.offloads_optimizer:
        host.update(sizes)
        sizes = dict.fromkeys(sizes, 0)
    memory = MemoryPlan(
        parameters=at_rest + frozen * _item_size(options),
        gradients=sizes["gradients"],
        optimizer_state=sizes["optimizer state"],
        master_weights=sizes["master weights"],
        buffers=buffers,
        batch=batch_bytes,
        host=host,
    )
    return replace(
        base,
        memory=memory,
        accumulation=accumulation,
        checkpoint_bytes=checkpoint,
        compute_dtype=str(options.dtype or torch.float32).removeprefix("torch."),
        simulated=False,
        notes=(*base.notes, _NOTE),
        failure=_NOTE,
    )


def _item_size(options: Any) -> int:
    return 4 if options.dtype is None else int(options.dtype.itemsize)


def _layout(
    groups: Sequence[Sequence[Tensor]], options: Any, zero: Mapping[str, Any], world: int
) -> tuple[list[list[Tensor]], int, int]:
    """Return the tensors that the optimizer of a rank updates, by group, and the bytes of parameters and gradients."""
    size = _item_size(options)
    if options.stage == 0:
        numel = sum(each.numel() for group in groups for each in group)
        # In half precision, the optimizer reads copies of the gradients in float32.
        gradients = numel * 4 if options.dtype is None else numel * (size + 4)
        return [[torch.empty_like(each) for each in group] for group in groups], numel * size, gradients
    if options.stage < 3:
        multiple = _ALIGNMENT * world
        padded = [math.ceil(sum(each.numel() for each in group) / multiple) * multiple for group in groups]
        updated = [[torch.empty(count // world)] if count else [] for count in padded]
        return updated, sum(padded) * size, sum(padded) // world * 4
    largest = int(zero.get("sub_group_size", _SUB_GROUP_SIZE))
    updated = [[torch.empty(count) for count in _sub_groups(group, world, largest)] for group in groups]
    partitions = sum(each.numel() for group in updated for each in group)
    limit = int(
        zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    )
    persistent = sum(each.numel() for group in groups for each in group if each.numel() <= limit)
    # Gradients are collected in a buffer in the dtype of the computation, and copied to float32 for the update.
    return updated, (partitions + persistent) * size, partitions * (size + 4)


def _sub_groups(group: Sequence[Tensor], world: int, largest: int) -> list[int]:
    """Return the number of elements of a rank in each sub-group of stage 3, which is updated at once."""
    counts: list[int] = []
    current = 0
    for index, parameter in enumerate(group):
        current += math.ceil(parameter.numel() / world)
        if current >= largest or index == len(group) - 1:
            counts.append(current)
            current = 0
    return counts


def _state_bytes(optimizer: Any, updated: Sequence[Sequence[Tensor]]) -> int:
    """Return the size of the state that an optimizer creates for other tensors than its own."""
    for group, tensors in zip(optimizer.param_groups, updated, strict=True):
        group["params"] = [nn.Parameter(each) for each in tensors]
        for each in group["params"]:
            each.grad = torch.empty_like(each)
    optimizer.state.clear()
    optimizer.step()
    state = [each for each in tree_leaves(dict(optimizer.state)) if isinstance(each, Tensor)]
    return storage_bytes(each for each in state if not isinstance(each, nn.Parameter))
