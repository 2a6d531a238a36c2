"""Plans of a model with round numbers, made by hand."""

from __future__ import annotations

from typing import Any

from stratagem.planning.result import Collective, MemoryPlan, ModelFacts, Plan, StepPlan

GIB = 2**30

MODEL = ModelFacts(
    name="Llama",
    parameters=7 * 10**9,
    trainable=7 * 10**9,
    parameter_bytes=26 * GIB,
    buffer_bytes=0,
    batch=("int64[2, 4096]",),
    batch_source="the first batch of train_dataloader",
)


def memory(
    *, parameters: int, gradients: int, optimizer: int, activations: int | None = 8, gathered: int = 0, **more: Any
) -> MemoryPlan:
    """Return the memory of a rank, in GiB; ``activations=None`` if the step could not be simulated."""
    sizes = {
        "parameters": parameters * GIB, "gradients": gradients * GIB, "optimizer state": optimizer * GIB,
        "gathered parameters": gathered * GIB,
    }  # fmt: skip
    simulated: dict[str, Any] = {}
    if activations is not None:
        sizes["activations"] = activations * GIB
        simulated = {"activations": activations * GIB, "peak": sum(sizes.values()), "at_peak": sizes}
    return MemoryPlan(
        parameters=parameters * GIB, gradients=gradients * GIB, optimizer_state=optimizer * GIB, context=GIB,
        **simulated, **more,
    )  # fmt: skip


def step(label: str, sizes: MemoryPlan, **changes: Any) -> StepPlan:
    """Return a plan for 16 ranks on two nodes, whose ranks process two samples each with 1e15 FLOP in bfloat16."""
    values: dict[str, Any] = {
        "label": label, "strategy": "FSDPStrategy", "options": {}, "world": 16, "gpus_per_node": 8, "dp_size": 16,
        "micro_batch": 2, "accumulation": 1, "memory": sizes, "flops": 10**15, "compute_dtype": "bfloat16",
        "checkpoint_bytes": 78 * GIB,
    }  # fmt: skip
    return StepPlan(**{**values, **changes})


def collective(kind: str, nbytes: int, *, count: int = 1, group: int = 16, per_node: int = 8) -> Collective:
    """Return collectives of one kind."""
    return Collective(kind=kind, count=count, bytes=nbytes, group_size=group, ranks_per_node=per_node)


def plan(*steps: StepPlan) -> Plan:
    """Return a plan of the model."""
    return Plan(model=MODEL, steps=steps)
