"""Where DeepSpeed keeps what it trains: the part of each parameter that this rank updates, in the engine's own master_weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.distributed import all_reduce

__all__ = [
    "ShardRange",
    "MasterWeights",
    "Stage0MasterWeights",
    "Stage0Params",
    "Stage12MasterWeights",
    "Stage3MasterWeights",
]

ShardRanges = dict[nn.Parameter, "ShardRange"]


@final
@dataclass(frozen=True, slots=True)
class ShardRange:
    """Consecutive elements of a parameter that this rank updates.

    Attributes:
        flat: what the optimizer steps; its state has tensors of the same shape.
        offset: where in ``flat`` the elements are.
        start: where in the parameter they are.
        count: how many there are, maybe 0.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of ``flat``, or of a tensor of its shape: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


class MasterWeights(ABC):
    """The master_weights of one kind of DeepSpeed's optimizers.

    Attributes:
        shard_ranges: for each parameter that is trained, the elements that this rank updates.
        sharded: whether ranks update different elements; else each has all.
        groups_empty_between_steps: whether the optimizer's groups are filled by the engine while it steps alone.
        clips: whether the engine clips gradients itself.
        accumulates_extra_backward: whether a further backward pass after the one that completed a window adds to its gradients.
    """

    shard_ranges: ShardRanges
    sharded: bool = True
    groups_empty_between_steps: bool = False
    clips: bool = True
    accumulates_extra_backward: bool = False

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients of a complete window, each element once over all ranks where they are sharded."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Drop the gradients of this window."""

    @abstractmethod
    def update_model_params(self) -> None:
        """Let the weights that compute follow those that are updated, on every rank. Collective."""

    def needs_forward(self) -> bool:
        """Return whether no backward pass may follow before a forward pass."""
        return False

    def complete_gradients(self) -> None:  # noqa: B027 -- nothing to do is the usual case
        """Put the gradients of a window of several micro-batches where the step reads them."""

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of a complete window."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    def norm(self) -> Tensor:
        """Return the norm of all gradients. Collective where they are sharded."""
        parts = [part for part in self.gradients() if part.numel()]
        norm = torch.zeros(()) if not parts else torch.stack(torch._foreach_norm(parts, 2.0)).float().norm()
        if self.sharded:
            norm = norm.square()
            all_reduce(norm)
            norm = norm.sqrt()
        return norm

    def flats(self) -> Iterator[Tensor]:
        """Yield what the optimizer steps, each once."""
        yield from {id(shard_range.flat): shard_range.flat for shard_range in self.shard_ranges.values()}.values()


@final
class Stage0Params(MasterWeights):
    """Stage 0 in the parameters' own type: the optimizer steps the parameters.

    Args:
        trained: the parameters of the optimizer.
    """

    sharded = False
    accumulates_extra_backward = True
    # DeepSpeed 0.19 would, but fails where a parameter is a single number.
    clips = False

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.shard_ranges = {each: ShardRange(each, 0, 0, each.numel()) for each in trained}

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.shard_ranges if each.grad is not None]

    def discard_gradients(self) -> None:
        for each in self.shard_ranges:
            each.grad = None

    def update_model_params(self) -> None:
        """They are the same."""


@final
class Stage0MasterWeights(MasterWeights):
    """Stage 0 in 16 bits: every rank steps float32 masters of all parameters.

    Args:
        optimizer: DeepSpeed's.
    """

    sharded = False
    accumulates_extra_backward = True

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.shard_ranges = {
            parameter: ShardRange(master, 0, 0, master.numel())
            for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for parameter, master in zip(group, masters, strict=True)
        }

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.shard_ranges if each.grad is not None]

    def discard_gradients(self) -> None:
        self._optimizer.zero_grad()

    @torch.no_grad()
    def update_model_params(self) -> None:
        for parameter, shard_range in self.shard_ranges.items():
            parameter.copy_(shard_range.flat)


@final
class Stage12MasterWeights(MasterWeights):
    """Stages 1 and 2: the parameters of a group lie one after another, and each rank steps a stretch of them.

    Args:
        optimizer: DeepSpeed's.
        rank: this process's.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self.shard_ranges = {}
        for index, group in enumerate(optimizer.round_robin_bit16_groups):
            flat = optimizer.single_partition_of_fp32_groups[index]
            begin = rank * optimizer.partition_size[index]
            end = begin + optimizer.partition_size[index]
            for parameter, place in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
                first, last = max(begin, place), min(end, place + parameter.numel())
                count = max(0, last - first)
                self.shard_ranges[parameter] = ShardRange(
                    flat, first - begin if count else 0, first - place if count else 0, count
                )

    def gradients(self) -> list[Tensor]:
        if self._optimizer.cpu_offload:
            return [flat.grad for flat in self._optimizer.single_partition_of_fp32_groups]
        return [part for parts in self._optimizer.averaged_gradients.values() for part in parts or ()]

    def complete_gradients(self) -> None:
        # In the last micro-batch DeepSpeed copies those of the parameters that this one used.
        if self._optimizer.cpu_offload:
            self._optimizer._finalize_cpu_offload_gradient_accumulation()

    def scale_gradients(self, factor: Tensor) -> None:
        super().scale_gradients(factor)
        if self._optimizer.cpu_offload:
            _scale_noted_norms(self._optimizer, factor)

    def discard_gradients(self) -> None:
        own = self._optimizer
        own.micro_step_id = -1
        own.zero_grad(set_to_none=True)
        for kept in (own.averaged_gradients, own.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        if own.cpu_offload:
            own._offload_accumulated_param_ids = set()
            own.reset_cpu_buffers()
            # A parameter whose first gradient comes in a later micro-batch adds it to what is here.
            for accumulated in own.accumulated_grads_in_cpu.values():
                accumulated.zero_()
            for flat in own.single_partition_of_fp32_groups:
                flat.grad.zero_()

    def update_model_params(self) -> None:
        self._optimizer.update_lp_params()


@final
class Stage3MasterWeights(MasterWeights):
    """Stage 3: each parameter is cut into equal parts, one a rank.

    Args:
        optimizer: DeepSpeed's.
        rank: this process's.
    """

    groups_empty_between_steps = True
    accumulates_extra_backward = True

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self.shard_ranges = {}
        for group in optimizer.fp16_groups:
            for parameter in group:
                index, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(rank * part, parameter.ds_numel)
                count = min(part, parameter.ds_numel - start)
                self.shard_ranges[parameter] = ShardRange(
                    optimizer.fp32_partitioned_groups_flat[index], offset, start, count
                )

    def gradients(self) -> list[Tensor]:
        if self._optimizer.offload_optimizer:
            return [flat.grad for flat in self._optimizer.fp32_partitioned_groups_flat]
        return [part for parts in self._optimizer.averaged_gradients.values() for part in parts or ()]

    def needs_forward(self) -> bool:
        return bool(self._optimizer._epilogue_ran_this_backward)

    def complete_gradients(self) -> None:
        if self._optimizer.offload_optimizer:
            self._optimizer._finalize_offload_gradient_accumulation()

    def scale_gradients(self, factor: Tensor) -> None:
        super().scale_gradients(factor)
        if self._optimizer.offload_optimizer:
            _scale_noted_norms(self._optimizer, factor)

    def discard_gradients(self) -> None:
        own = self._optimizer
        own.zero_grad(set_to_none=True)
        # All partitions are read in each step, but only a parameter's own backward pass overwrites its partition.
        own.grad_partitions_flat_buffer.zero_()
        own._offload_boundary_param_ids = set()
        if own.offload_optimizer:
            own.reset_cpu_buffers()
            for flat in own.fp32_partitioned_groups_flat:
                flat.grad.zero_()
        else:
            own.averaged_gradients = {}

    def update_model_params(self) -> None:
        self._optimizer.checkpoint_event_prologue()
        for index in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
        self._optimizer.checkpoint_event_epilogue()


def _scale_noted_norms(optimizer: Any, factor: Tensor) -> None:
    """Scale the norms that DeepSpeed noted in the backward pass, by which it clips what it has offloaded."""
    noted = optimizer.norm_for_param_grads
    noted.update({key: norm * factor for key, norm in noted.items()})
