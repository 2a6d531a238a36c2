"""What this rank has of each parameter: where ColossalAI's optimizers keep weights, gradients and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.interface import OptimizerWrapper
from colossalai.tensor.d_tensor.api import is_customized_distributed_tensor, is_distributed_tensor
from colossalai.tensor.padded_tensor import is_padded_tensor
from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor, nn

from stratagem.checkpoint import ShardedTensorState, TensorBox, boxes_of_range, take_box
from stratagem.errors import PlacementError

__all__ = ["ParamShard", "gradients_of", "param_shards"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ParamShard:
    """What this rank has of one parameter.

    Tensor parallelism leaves it a box of the whole, ZeRO a range of that box's elements in row-major order.

    Attributes:
        name: of the parameter in the bare model.
        working: the parameter itself, in the type that is computed in: this rank's box of it.
        master: what the optimizer updates: the parameter, or a copy in float32, or a range of one. Its end may be padding.
        shape: of the whole parameter.
        box: where ``working`` lies in the whole.
        start: the first element of ``working`` that ``master`` has.
        count: how many elements of it ``master`` has.
        copies: how many ranks have the same as this one.
    """

    name: str
    working: nn.Parameter
    master: Tensor
    shape: torch.Size
    box: TensorBox
    start: int
    count: int
    copies: int

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all of it."""
        return self.count == self.shape.numel()

    def pieces(self, values: Tensor) -> ShardedTensorState:
        """Return what a tensor that is laid out like ``master``, such as a moment, has of the whole. Not a copy."""
        flat = values.detach().reshape(-1)
        done = 0
        shards: dict[TensorBox, Tensor] = {}
        for box in self._boxes():
            shards[box] = flat[done : done + box.numel].view(box.shape)
            done += box.numel
        return ShardedTensorState(values.dtype, self.shape, shards)

    @torch.no_grad()
    def put(self, full: Tensor | ShardedTensorState, into: Tensor) -> None:
        """Overwrite a tensor that is laid out like ``master`` with its shard of a whole one; only that is read."""
        flat = into.detach().view(-1)
        done = 0
        for box in self._boxes():
            flat[done : done + box.numel].copy_(take_box(full, box).reshape(-1))
            done += box.numel
        flat[done:].zero_()

    @torch.no_grad()
    def put_working(self, full: Tensor | ShardedTensorState) -> None:
        """Overwrite the parameter that is computed with by its box of a whole tensor."""
        self.working.copy_(take_box(full, self.box))

    def _boxes(self) -> Iterator[TensorBox]:
        for own in boxes_of_range(self.box.shape, self.start, self.start + self.count):
            yield TensorBox(
                tuple(first + offset for first, offset in zip(own.start, self.box.start, strict=True)), own.shape
            )


def param_shards(model: nn.Module, engine: OptimizerWrapper | None) -> dict[nn.Parameter, ParamShard]:
    """Return what this rank has of every parameter of a boosted model; without an optimizer, of its weights alone.

    Raises:
        PlacementError: if a policy cut a parameter into something that is no box of it.
    """
    return {parameter: _param_shard(name, parameter, engine) for name, parameter in model.named_parameters()}


def _param_shard(name: str, parameter: nn.Parameter, engine: OptimizerWrapper | None) -> ParamShard:
    shape, box, same_box = _box(name, parameter)
    whole: dict[str, Any] = {"start": 0, "count": parameter.numel(), "copies": same_box, "master": parameter}
    if isinstance(engine, LowLevelZeroOptimizer):
        whole.update(_range(parameter, engine, same_box))
    elif isinstance(engine, MixedPrecisionOptimizer):
        whole["master"] = engine.working_to_master_map.get(parameter, parameter)
    return ParamShard(name=name, working=parameter, shape=shape, box=box, **whole)


def _box(name: str, parameter: nn.Parameter) -> tuple[torch.Size, TensorBox, int]:
    """Return the shape of the whole, where this rank's box lies in it, and how many ranks have that box."""
    world = dist.get_world_size()
    if is_customized_distributed_tensor(parameter) or is_padded_tensor(parameter):
        raise PlacementError(
            f"The policy cuts {name} into interleaved or padded parts, which no other strategy could load. Shard it into "
            "one block per rank: keep query, key and value apart, and a vocabulary that tp_size and "
            "make_vocab_size_divisible_by divide."
        )
    if not is_distributed_tensor(parameter):
        return parameter.shape, TensorBox.whole(parameter.shape), world
    spread: Any = parameter
    layout = spread.dist_layout
    start = [0] * parameter.ndim
    ranks = 1
    for dim, axes in layout.sharding_spec.dim_partition_dict.items():
        if len(axes) != 1:
            raise PlacementError(
                f"The policy cuts {name} along several axes of ranks; tensor parallelism here has one."
            )
        group = layout.device_mesh.get_process_group(axis=axes[0])
        start[dim] = dist.get_rank(group) * parameter.shape[dim]
        ranks *= dist.get_world_size(group)
    return layout.global_shape, TensorBox(tuple(start), tuple(parameter.shape)), world // ranks


def _range(parameter: nn.Parameter, engine: LowLevelZeroOptimizer, same_box: int) -> Mapping[str, Any]:
    """Return which elements of its box this rank updates under ZeRO: each rank has as many, with padding at the end."""
    master = engine.working_to_master_param.get(id(parameter))
    if master is None:
        return {}  # it does not learn
    store = engine.pid_to_bucket_store[id(parameter)]
    start = min(store.local_rank * master.numel(), parameter.numel())
    count = min(master.numel(), parameter.numel() - start)
    return {"master": master, "start": start, "count": count, "copies": same_box // store.world_size}


def gradients_of(param_shards: Iterable[ParamShard], engine: OptimizerWrapper) -> list[tuple[ParamShard, Tensor]]:
    """Return the gradients by which this rank updates its param_shards, themselves, where there are any."""
    found = []
    for shard in param_shards:
        if isinstance(engine, LowLevelZeroOptimizer) and shard.master is not shard.working:
            gradient = engine.get_working_grad_by_param_id(id(shard.working))
        else:
            gradient = shard.working.grad
        if gradient is not None:
            found.append((shard, gradient))
    return found
