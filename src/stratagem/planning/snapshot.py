"""The sizes of a prepared strategy and of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from stratagem.planning.simulate import Simulation, StepRecord
from stratagem.planning.trace import storage_bytes
from stratagem.tensors.dtensor import to_local
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["Snapshot", "snapshot"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A prepared strategy, as rank 0 has it. Sizes are in bytes.

    Attributes:
        parameters: the size of the parameters.
        gradients: that of the gradients that the optimizer reads.
        optimizer_state: that of the state of the optimizers, on the rank with the most.
        state_excess: what this rank has less of it; None if every rank has a shard of all state.
        averages: that of averaged weights.
        buffers: that of the buffers.
        own_checkpoint: what this rank has of a checkpoint.
        checkpoint: the size of a checkpoint of all ranks.
        largest_parameter: the size of the largest parameter of the model.
        is_sharded: whether the ranks have different parts of the parameters.
        dp_size: the number of ranks that process different samples.
        accumulation: the number of micro-batches before an update.
        notes: what qualifies the sizes.
        step: a step; None if none was simulated.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    state_excess: int | None
    averages: int
    buffers: int
    own_checkpoint: int
    checkpoint: int
    largest_parameter: int
    is_sharded: bool
    dp_size: int
    accumulation: int
    notes: tuple[str, ...]
    step: StepRecord | None


def snapshot(sim: Simulation, record: StepRecord | None, average: EMAHook | None) -> Snapshot:
    """Return the sizes of a simulation.

    Args:
        sim: the simulation.
        record: a step; None to compute the sizes of the gradients and the optimizer state without one.
        average: the hook that averages the weights, if any.
    """
    gradients = sim.gradients_only() if record is None else record.gradients
    averages = [] if average is None else list(average.build_average(sim.model).averages.values())
    others = sim.other_ranks_state()
    return Snapshot(
        parameters=storage_bytes(sim.parameters()),
        gradients=gradients,
        optimizer_state=storage_bytes(sim.optimizer_state()) + (0 if others is None else others.excess),
        state_excess=None if others is None else others.excess,
        averages=storage_bytes(averages),
        buffers=storage_bytes(sim.buffers()),
        own_checkpoint=sim.own_checkpoint_bytes() + sum(to_local(each).nbytes for each in averages),
        checkpoint=sim.checkpoint_bytes()
        + sum(each.nbytes for each in averages)
        + (0 if others is None else others.total),
        largest_parameter=max((each.nbytes for each in sim.parameters()), default=0),
        is_sharded=sim.strategy.collective_forward,
        dp_size=sim.strategy.dp_size,
        accumulation=sim.accumulation,
        notes=_notes(sim),
        step=record,
    )


def _notes(sim: Simulation) -> tuple[str, ...]:
    """Return what qualifies the sizes of a simulation."""
    if not sim.reads_values:
        return ()
    names = {type(wrapper.optimizer).__name__ for wrapper in sim.strategy.optim_wrapper.each().values()}
    return (f"{', '.join(sorted(names))} reads values of tensors in its update. Sizes that depend on them may differ.",)
