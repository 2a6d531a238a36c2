"""The result of planning a training job. All sizes are bytes of one rank; rank 0, whose shards are never smaller than others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

__all__ = ["CONTEXT_BYTES", "Collective", "MemoryPlan", "ModelFacts", "Plan", "StepPlan"]

# The memory that the driver, its libraries and the communicators take on a GPU before any tensor is allocated. It is an
# assumption: the value differs between GPUs, versions and numbers of communicators.
CONTEXT_BYTES = 1 * 2**30


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the model that do not depend on the strategy.

    Attributes:
        name: the class of the model.
        parameters: the number of parameters; shared parameters count once.
        trainable: the number of parameters that are trainable.
        parameter_bytes: the size of all parameters in the dtype in which they are built.
        buffer_bytes: the size of all buffers.
        batch: a description of the batch, such as ``"int64[16, 128]"`` for each tensor.
        batch_source: where the batch comes from, such as ``"the first batch of train_dataloader"``.
    """

    name: str
    parameters: int
    trainable: int
    parameter_bytes: int
    buffer_bytes: int
    batch: tuple[str, ...] = ()
    batch_source: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory of one rank, in bytes.

    ``parameters`` to ``buffers`` are static: they are allocated during the whole run, gradients between the backward pass and
    the update. These sizes are exact. ``activations`` and ``peak`` come from a simulated step; None if it could not be
    simulated.

    Attributes:
        parameters: the parameters or shards of this rank.
        gradients: the gradients or shards that the optimizer reads.
        optimizer_state: the state of the optimizers, without master weights.
        master_weights: copies of the parameters in full precision that the strategy keeps outside the model.
        ema: averaged weights.
        buffers: the buffers of the model.
        batch: the tensors of a batch.
        activations: tensors that the forward pass saves for the backward pass, counted once per storage.
        peak: the largest sum of all tensors at any time in a step, without ``context``.
        at_peak: the sizes at that time by kind; their sum is ``peak``. The kinds are "parameters", "gradients",
            "optimizer state", "master weights", "averaged weights", "buffers", "batch", "activations", "gathered parameters",
            "communication" and "temporary".
        peak_phase: the part of the step with the peak: ``"forward"``, ``"backward"`` or ``"update"``.
        transient: the largest temporary sizes by name, which need not coincide: "gathered parameters", "communication",
            "temporary", "largest tensor", "loading".
        context: the assumed memory of the driver and its libraries; see ``CONTEXT_BYTES``.
        host: sizes in CPU memory by kind: "asynchronous save" is the copy of the state that is written in the background, and
            with ``cpu_offload``, there are parameters, gradients and optimizer state; with an optimizer that DeepSpeed offloads,
            there are "copies for updates". These are not part of the other attributes.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    master_weights: int = 0
    ema: int = 0
    buffers: int = 0
    batch: int = 0
    activations: int | None = None
    peak: int | None = None
    at_peak: Mapping[str, int] = field(default_factory=dict)
    peak_phase: str | None = None
    transient: Mapping[str, int] = field(default_factory=dict)
    context: int = CONTEXT_BYTES
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def static(self) -> int:
        """The sum of the sizes that are exact: everything except batch, activations, temporary tensors and context."""
        return self.parameters + self.gradients + self.optimizer_state + self.master_weights + self.ema + self.buffers

    @property
    def total(self) -> int:
        """The memory that a device must have: the peak and the context; without a simulated step, static sizes and context."""
        return self.context + (self.static + self.batch if self.peak is None else self.peak)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """Collectives of one kind in an optimizer step, as rank 0 runs them.

    Attributes:
        kind: ``"all_reduce"``, ``"all_gather"``, ``"reduce_scatter"``, ``"broadcast"``, ``"all_to_all"`` ...
        count: the number of collectives.
        bytes: the sum of their message sizes, each the size of the largest tensor of the call: the gathered tensor of an
            all-gather, the tensor before the reduction of a reduce-scatter, the whole tensor of an all-reduce.
        group_size: the number of ranks that take part.
        ranks_per_node: the number of these ranks on the node of rank 0. If it equals ``group_size``, the collective does not
            leave the node.
        phase: the part of the step: ``"forward"``, ``"backward"`` or ``"update"``.
    """

    kind: str
    count: int
    bytes: int
    group_size: int
    ranks_per_node: int
    phase: str = ""

    @property
    def inside_node(self) -> bool:
        """Whether all ranks of the group are on one node."""
        return self.ranks_per_node == self.group_size


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One strategy at one world size.

    Attributes:
        label: a short name of the strategy and its options, such as ``"FSDP tp=2"``.
        strategy: the name of the class.
        options: the arguments of the class.
        world: the number of ranks.
        gpus_per_node: the number of ranks on a node.
        dp_size: the number of ranks that process different samples.
        micro_batch: the number of samples that a rank processes at a time; None if unknown.
        accumulation: the number of micro-batches before an update.
        memory: the memory of one rank.
        collectives: the collectives of an optimizer step with all its micro-batches.
        flops: floating-point operations of a rank in an optimizer step with all its micro-batches, as torch counts them; None if
            unknown.
        compute_dtype: the dtype of the operands of most floating-point operations, such as ``"bfloat16"``.
        largest_micro_batch: the largest micro-batch that fits ``memory_limit``; None without a limit or a simulated step; 0 if
            none fits.
        memory_limit: the memory of the device, in bytes; None if none was given.
        checkpoint_bytes: the size of a checkpoint of the whole job: weights, optimizer state and averaged weights.
        resume_bytes: the bytes of such a checkpoint that a rank reads to resume: an equal share of all bytes, which it verifies,
            and its own part of the state; 0 if unknown.
        simulated: whether the code that trains was run with fake tensors. If not, documented partitioning rules were used.
        notes: facts that qualify the figures, one sentence each.
        failure: why the step could not be simulated, with file and line; None if it was.
        refusal: why this strategy cannot train this model at this world size; None if it can. All sizes are then zero.
        seconds: the time that planning took.
    """

    label: str
    strategy: str
    options: Mapping[str, Any]
    world: int
    gpus_per_node: int
    dp_size: int
    micro_batch: int | None
    accumulation: int
    memory: MemoryPlan
    collectives: tuple[Collective, ...] = ()
    flops: int | None = None
    compute_dtype: str = "float32"
    largest_micro_batch: int | None = None
    memory_limit: int | None = None
    checkpoint_bytes: int = 0
    resume_bytes: int = 0
    simulated: bool = True
    notes: tuple[str, ...] = ()
    failure: str | None = None
    refusal: str | None = None
    seconds: float = 0.0

    @property
    def fits(self) -> bool | None:
        """Whether the job fits the device; None without a limit."""
        if self.memory_limit is None or self.refusal is not None:
            return None
        return self.memory.total <= self.memory_limit


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plans of several strategies and world sizes for one model."""

    model: ModelFacts
    steps: tuple[StepPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        steps = [
            {
                **asdict(step),
                "memory": {
                    **asdict(step.memory),
                    "static": step.memory.static,
                    "total": step.memory.total,
                },
                "fits": step.fits,
            }
            for step in self.steps
        ]
        return {"model": asdict(self.model), "steps": steps}
