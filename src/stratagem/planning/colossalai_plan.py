"""Plan ``ColossalAIStrategy``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.errors import PlacementError
from stratagem.planning.colossalai import DataParallel, LowLevelZero, PluginJob
from stratagem.planning.engines import EngineRequest, EngineStatic, batch_bytes, finish, state_bytes
from stratagem.planning.fake_world import fake_copies, new_fake_mode, without_fake_tensors
from stratagem.planning.ledger import EngineStep, Ledger
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.sharded_layers import shard_linear_layers
from stratagem.planning.timeline import Timeline
from stratagem.planning.trace import storage_bytes
from stratagem.strategies.base import require_master_weights
from stratagem.strategies.setup.building import build_optim_wrapper
from stratagem.utils import import_object

__all__ = ["plan_colossalai"]

_NOTE: Final = (
    "Computed by the rules of ColossalAI from a simulated forward and backward pass. The peak is an estimate."
)
_BATCH_NORM: Final = "The plugin converts BatchNorm to SyncBatchNorm, whose messages are not included."
_DTYPES: Final[Mapping[str, torch.dtype | None]] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIB: Final = 2**20


def plan_colossalai(request: EngineRequest, base: StepPlan) -> list[StepPlan]:
    """Return the plans of ``ColossalAIStrategy`` for each memory limit.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
        PlacementError: if the strategy does not support a plugin, an option or the optimizer, or the plan does not.
    """
    spec = import_object("stratagem.engines.colossalai.strategy:parse_for_plan")(base.options)
    if not hasattr(spec, "kind"):
        raise PlacementError(
            "Planning requires the name and the options of a plugin, not a plugin that is already built."
        )
    if spec.options.get("custom_policy") is not None:
        raise PlacementError("Planning does not support custom_policy. Define tp_plan in the model instead.")
    if base.world % spec.tp_size:
        raise PlacementError(
            f"plugin: tp_size={spec.tp_size} must divide the number of processes, but this run has {base.world}."
        )
    dtype = _DTYPES[spec.options.get("precision", "fp32")]
    if request.average is not None:
        require_master_weights("ColossalAIStrategy", available=dtype is None and spec.tp_size == 1)
    # Outside of the mode, because the constructor may read values of tensors.
    model = request.job.make_model()
    with new_fake_mode() as mode:
        if spec.tp_size > 1:
            shard_linear_layers(model, spec.tp_size, lambda _: None)
        fake_copies(mode, model, torch.device("cpu"))
        wrapper: Any = build_optim_wrapper(request.job.optim_wrapper, model)
        without_fake_tensors(import_object("stratagem.engines.colossalai.options:check_plugin_wrapper"))(spec, wrapper)
        averages = [] if request.average is None else list(request.average.build_average(model).averages.values())
        planned = _planned(spec, base, model, wrapper, dtype)
        ema = storage_bytes(averages)
    job, memory, checkpoint = planned
    memory = replace(
        memory, ema=ema, batch=0 if request.timelines.batch is None else batch_bytes(request.timelines.batch)
    )
    static = EngineStatic(
        memory=memory,
        buckets=_bucket_bytes(job),
        resting_gradients=0,
        dtype=dtype,
        tp_size=spec.tp_size,
        accumulation=int(wrapper.accumulative_counts),
        make=_step_of(job),
    )
    synchronizes = job.wraps_replicas and any(isinstance(each, _BatchNorm) for each in model.modules())
    base = replace(
        base,
        dp_size=job.dp_size,
        accumulation=static.accumulation,
        checkpoint_bytes=checkpoint + ema,
        compute_dtype=str(dtype or torch.float32).removeprefix("torch."),
        notes=(*base.notes, _BATCH_NORM) if synchronizes else base.notes,
    )
    return finish(request, base, static, _NOTE)


def _step_of(job: PluginJob) -> Callable[[Ledger, Timeline], EngineStep]:
    def make(ledger: Ledger, timeline: Timeline) -> EngineStep:
        return LowLevelZero(job, ledger, timeline) if job.stage else DataParallel(job, ledger, timeline)

    return make


def _bucket_bytes(job: PluginJob) -> int:
    """Return the bytes of the buckets of ``DistributedDataParallel``, which exist during the whole run."""
    if not job.wraps_replicas:
        return 0
    return sum(job.numels[each] for group in job.groups for each in group) * job.itemsize


def _planned(
    spec: Any, base: StepPlan, model: nn.Module, wrapper: Any, dtype: torch.dtype | None
) -> tuple[PluginJob, MemoryPlan, int]:
    """Return the job of the replay, the static sizes, and the size of a checkpoint."""
    options = spec.options
    parameters = list(model.parameters())
    index = {id(each): number for number, each in enumerate(parameters)}
    groups = [[each for each in group["params"] if each.requires_grad] for group in wrapper.optimizer.param_groups]
    itemsize = 4 if dtype is None else dtype.itemsize
    dp_size = base.world // spec.tp_size
    stage = spec.zero_stage
    offloads = bool(options.get("cpu_offload")) and stage > 0
    masters_exist = bool(options.get("master_weights", True)) if stage else dtype is not None

    def padded(each: Tensor) -> int:
        return -(-each.numel() // dp_size) * dp_size if stage else each.numel()

    trained = [each for group in groups for each in group]
    ranges = [[torch.empty(padded(each) // dp_size) for each in group] for group in groups]
    updated = ranges if stage else [[torch.empty(each.shape) for each in group] for group in groups]
    if stage and not masters_exist:
        updated = [[each.to(dtype or torch.float32) for each in group] for group in updated]
    numel = sum(each.numel() for group in updated for each in group)
    saved = sum(each.nbytes for each in model.state_dict().values())
    state, temporary = state_bytes(wrapper.optimizer, updated)
    names = {id(each) for each in trained}
    at_rest = sum(padded(each) if id(each) in names else each.numel() for each in parameters) * itemsize
    if stage:
        reduced = numel * itemsize if stage == 2 else sum(map(padded, trained)) * itemsize
        gradients = reduced + (4 * numel if itemsize < 4 and not offloads else 0)
    else:
        gradients = 4 * sum(each.numel() for each in trained)
    sizes = {"optimizer state": state, "master weights": 4 * numel if masters_exist else 0}
    host = {"asynchronous save": at_rest + sum(sizes.values())}
    if offloads:
        host.update(sizes)
        sizes = dict.fromkeys(sizes, 0)
    buffers: Counter[torch.dtype] = Counter()
    for each in model.buffers():
        kept = dtype if dtype is not None and each.is_floating_point() else each.dtype
        buffers[kept] += each.numel() * kept.itemsize
    memory = MemoryPlan(
        parameters=at_rest,
        gradients=gradients,
        optimizer_state=sizes["optimizer state"],
        master_weights=sizes["master weights"],
        buffers=sum(buffers.values()),
        host=host,
    )
    wraps_replicas = spec.kind == "torch-ddp" or (spec.kind == "hybrid-parallel" and (stage == 0 or dp_size == 1))
    communication = options.get("communication_dtype")
    clipping = wrapper.clipping
    clips = options.get("max_norm", 0.0) or (clipping.limit if clipping is not None and spec.clips else 0.0)
    job = PluginJob(
        world=base.world,
        tp_size=spec.tp_size,
        stage=stage,
        itemsize=itemsize,
        communication_itemsize=getattr(torch, communication).itemsize if communication else itemsize,
        groups=tuple(tuple(index[id(each)] for each in group) for group in groups),
        numels=tuple(each.numel() for each in parameters),
        bucket_bytes=int(options.get("ddp_bucket_cap_mb", options.get("bucket_cap_mb", 25)) * _MIB),
        bucket_elements=int(options.get("reduce_bucket_size_in_m", options.get("zero_bucket_size_in_m", 12)) * _MIB),
        broadcasts=tuple(buffers.values()) if wraps_replicas and options.get("broadcast_buffers", True) else (),
        wraps_replicas=wraps_replicas,
        is_hybrid=spec.kind == "hybrid-parallel",
        max_norm=clips,
        scales_loss=dtype == torch.float16,
        offloads=offloads,
        temporary=temporary,
    )
    return job, memory, saved + state * (dp_size if stage else 1)
