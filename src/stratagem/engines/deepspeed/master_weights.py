"""The master weights in DeepSpeed's engine, and the range of each parameter that this rank updates."""

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
    """The consecutive elements of a parameter that this rank updates.

    Attributes:
        flat: the tensor that the optimizer updates. Its state consists of tensors of the same shape.
        offset: the index of the first element in ``flat``.
        start: the index of the first element in the parameter.
        count: the number of elements, which may be 0.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of these elements in ``flat`` or in a tensor with the same shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


class MasterWeights(ABC):
    """The master weights and gradients of a DeepSpeed optimizer. Each type of optimizer has a subclass.

    Attributes:
        shard_ranges: for each trainable parameter, the elements that this rank updates.
        sharded: whether ranks update different elements. Otherwise, each rank updates all elements.
        groups_empty_between_steps: whether the engine fills the optimizer's parameter groups only during its step.
        clips: whether the engine clips gradients itself.
        accumulates_extra_backward: whether a backward pass after a complete accumulation window adds to the gradients.
    """

    shard_ranges: ShardRanges
    sharded: bool = True
    groups_empty_between_steps: bool = False
    clips: bool = True
    accumulates_extra_backward: bool = False

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients of a complete accumulation window.

        If they are sharded, each element is on a single rank.
        """

    @abstractmethod
    def discard_gradients(self) -> None:
        """Discard the gradients of the current accumulation window."""

    @abstractmethod
    def update_model_params(self) -> None:
        """Copy the master weights to the model's parameters on all ranks. Collective."""

    def needs_forward(self) -> bool:
        """Return whether another forward pass is required before the next backward pass."""
        return False

    def complete_gradients(self) -> None:  # noqa: B027 -- nothing to do is the usual case
        """Move the accumulated gradients to the tensors that the step reads."""

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of a complete accumulation window by a factor."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    def norm(self) -> Tensor:
        """Return the global gradient norm. Collective if the gradients are sharded."""
        parts = [part for part in self.gradients() if part.numel()]
        norm = torch.zeros(()) if not parts else torch.stack(torch._foreach_norm(parts, 2.0)).float().norm()
        if self.sharded:
            norm = norm.square()
            all_reduce(norm)
            norm = norm.sqrt()
        return norm

    def flats(self) -> Iterator[Tensor]:
        """Yield each tensor that the optimizer updates, once."""
        yield from {id(shard_range.flat): shard_range.flat for shard_range in self.shard_ranges.values()}.values()


@final
class Stage0Params(MasterWeights):
    """Stage 0 without master weights: the optimizer updates the model's parameters directly.

    Args:
        trained: the optimizer's parameters.
    """

    sharded = False
    accumulates_extra_backward = True
    # Clipping in DeepSpeed 0.19 fails for scalar parameters.
    clips = False

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.shard_ranges = {each: ShardRange(each, 0, 0, each.numel()) for each in trained}

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.shard_ranges if each.grad is not None]

    def discard_gradients(self) -> None:
        for each in self.shard_ranges:
            each.grad = None

    def update_model_params(self) -> None:
        """Do nothing, since the parameters are the master weights."""


@final
class Stage0MasterWeights(MasterWeights):
    """Stage 0 in 16 bits: every rank updates float32 master weights of all parameters.

    Args:
        optimizer: the DeepSpeed optimizer.
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
    """Stages 1 and 2: the parameters of a group are concatenated, and each rank updates a range of the result.

    Args:
        optimizer: the DeepSpeed optimizer.
        rank: the rank of this process.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self.shard_ranges = {}
        for index, group in enumerate(optimizer.round_robin_bit16_groups):
            flat = optimizer.single_partition_of_fp32_groups[index]
            begin = rank * optimizer.partition_size[index]
            end = begin + optimizer.partition_size[index]
            for parameter, position in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
                first, last = max(begin, position), min(end, position + parameter.numel())
                count = max(0, last - first)
                self.shard_ranges[parameter] = ShardRange(
                    flat, first - begin if count else 0, first - position if count else 0, count
                )

    def gradients(self) -> list[Tensor]:
        if self._optimizer.cpu_offload:
            return [flat.grad for flat in self._optimizer.single_partition_of_fp32_groups]
        return [part for parts in self._optimizer.averaged_gradients.values() for part in parts or ()]

    def complete_gradients(self) -> None:
        # In the last micro-batch, DeepSpeed only copies the gradients of parameters that this micro-batch used.
        if self._optimizer.cpu_offload:
            self._optimizer._finalize_cpu_offload_gradient_accumulation()

    def scale_gradients(self, factor: Tensor) -> None:
        super().scale_gradients(factor)
        if self._optimizer.cpu_offload:
            _scale_stored_norms(self._optimizer, factor)

    def discard_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.micro_step_id = -1
        optimizer.zero_grad(set_to_none=True)
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
            # Zero these buffers, because all gradients are accumulated into them, including the first gradient of each
            # parameter.
            for accumulated in optimizer.accumulated_grads_in_cpu.values():
                accumulated.zero_()
            for flat in optimizer.single_partition_of_fp32_groups:
                flat.grad.zero_()

    def update_model_params(self) -> None:
        self._optimizer.update_lp_params()


@final
class Stage3MasterWeights(MasterWeights):
    """Stage 3: each parameter is divided into equal parts, one per rank.

    Args:
        optimizer: the DeepSpeed optimizer.
        rank: the rank of this process.
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
            _scale_stored_norms(self._optimizer, factor)

    def discard_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        # Each step reads all partitions, but the backward pass only overwrites the partitions of parameters with
        # gradients.
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer._offload_boundary_param_ids = set()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            for flat in optimizer.fp32_partitioned_groups_flat:
                flat.grad.zero_()
        else:
            optimizer.averaged_gradients = {}

    def update_model_params(self) -> None:
        self._optimizer.checkpoint_event_prologue()
        for index in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
        self._optimizer.checkpoint_event_epilogue()


def _scale_stored_norms(optimizer: Any, factor: Tensor) -> None:
    """Scale the norms that DeepSpeed stored in the backward pass and uses to clip offloaded gradients."""
    stored = optimizer.norm_for_param_grads
    stored.update({key: norm * factor for key, norm in stored.items()})
