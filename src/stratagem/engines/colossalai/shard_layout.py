"""This rank's shard of each parameter, and where ColossalAI's optimizers store its master weights and gradients."""

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
from stratagem.utils import named_parameters

__all__ = ["ParamShard", "gradients_of", "param_shards"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ParamShard:
    """This rank's shard of one parameter.

    Tensor parallelism assigns a box of the full parameter to the rank, and ZeRO a range of the elements of that box, in
    row-major order.

    Attributes:
        name: the parameter's name in the unwrapped model.
        working: the model's parameter, which holds this rank's box in the dtype used for computation.
        master: the tensor that the optimizer updates: the parameter, a float32 copy of it, or a range of either, which
            may end with padding.
        shape: the shape of the full parameter.
        box: the position of ``working`` in the full parameter.
        start: the index in ``working`` of the first element of ``master``.
        count: the number of elements of ``working`` in ``master``.
        num_copies: the number of ranks that have the same shard.
    """

    name: str
    working: nn.Parameter
    master: Tensor
    shape: torch.Size
    box: TensorBox
    start: int
    count: int
    num_copies: int

    @property
    def is_full(self) -> bool:
        """Whether this rank has the full parameter."""
        return self.count == self.shape.numel()

    def to_sharded_state(self, values: Tensor) -> ShardedTensorState:
        """Return the state of a tensor with the layout of ``master``, such as a moment, without a copy."""
        flat = values.detach().reshape(-1)
        done = 0
        shards: dict[TensorBox, Tensor] = {}
        for box in self._boxes():
            shards[box] = flat[done : done + box.numel].view(box.shape)
            done += box.numel
        return ShardedTensorState(values.dtype, self.shape, shards)

    @torch.no_grad()
    def write_full(self, full: Tensor | ShardedTensorState, into: Tensor) -> None:
        """Copy this rank's shard of a full tensor into a tensor with the layout of ``master``.

        Only the shard is read from the full tensor.
        """
        flat = into.detach().view(-1)
        done = 0
        for box in self._boxes():
            flat[done : done + box.numel].copy_(take_box(full, box).reshape(-1))
            done += box.numel
        flat[done:].zero_()

    @torch.no_grad()
    def write_full_working(self, full: Tensor | ShardedTensorState) -> None:
        """Copy this rank's box of a full tensor into the model's parameter."""
        self.working.copy_(take_box(full, self.box))

    def _boxes(self) -> Iterator[TensorBox]:
        for own in boxes_of_range(self.box.shape, self.start, self.start + self.count):
            yield TensorBox(
                tuple(first + offset for first, offset in zip(own.start, self.box.start, strict=True)), own.shape
            )


def param_shards(model: nn.Module, engine: OptimizerWrapper | None) -> dict[nn.Parameter, ParamShard]:
    """Return the shard of each parameter of a model wrapped by the booster. Without an optimizer, ``master`` is the parameter.

    Raises:
        PlacementError: if a policy has sharded a parameter into parts that are not boxes.
    """
    return {parameter: _param_shard(name, parameter, engine) for name, parameter in named_parameters(model).items()}


def _param_shard(name: str, parameter: nn.Parameter, engine: OptimizerWrapper | None) -> ParamShard:
    shape, box, same_box = _box(name, parameter)
    whole: dict[str, Any] = {"start": 0, "count": parameter.numel(), "num_copies": same_box, "master": parameter}
    if isinstance(engine, LowLevelZeroOptimizer):
        whole.update(_range(parameter, engine, same_box))
    elif isinstance(engine, MixedPrecisionOptimizer):
        whole["master"] = engine.working_to_master_map.get(parameter, parameter)
    return ParamShard(name=name, working=parameter, shape=shape, box=box, **whole)


def _box(name: str, parameter: nn.Parameter) -> tuple[torch.Size, TensorBox, int]:
    """Return the shape of the full parameter, this rank's box, and the number of ranks with the same box."""
    world = dist.get_world_size()
    if is_customized_distributed_tensor(parameter) or is_padded_tensor(parameter):
        raise PlacementError(
            f"The policy shards {name} into interleaved or padded parts, which cannot be loaded with other strategies. "
            "Shard it into one block per rank: use separate layers for query, key and value, and a vocabulary size "
            "that is divisible by tp_size and make_vocab_size_divisible_by."
        )
    if not is_distributed_tensor(parameter):
        return parameter.shape, TensorBox.whole(parameter.shape), world
    sharded: Any = parameter
    layout = sharded.dist_layout
    start = [0] * parameter.ndim
    ranks = 1
    for dim, axes in layout.sharding_spec.dim_partition_dict.items():
        if len(axes) != 1:
            raise PlacementError(
                f"The policy shards {name} along several dimensions of the device mesh, but only one is supported."
            )
        group = layout.device_mesh.get_process_group(axis=axes[0])
        start[dim] = dist.get_rank(group) * parameter.shape[dim]
        ranks *= dist.get_world_size(group)
    return layout.global_shape, TensorBox(tuple(start), tuple(parameter.shape)), world // ranks


def _range(parameter: nn.Parameter, engine: LowLevelZeroOptimizer, same_box: int) -> Mapping[str, Any]:
    """Return the range of elements that this rank updates under ZeRO. Ranges have equal lengths; the last ones are padded."""
    master = engine.working_to_master_param.get(id(parameter))
    if master is None:
        return {}  # The parameter is frozen.
    store = engine.pid_to_bucket_store[id(parameter)]
    start = min(store.local_rank * master.numel(), parameter.numel())
    count = min(master.numel(), parameter.numel() - start)
    return {"master": master, "start": start, "count": count, "num_copies": same_box // store.world_size}


def gradients_of(param_shards: Iterable[ParamShard], engine: OptimizerWrapper) -> list[tuple[ParamShard, Tensor]]:
    """Return the gradient of each shard that has one, without copying it."""
    found = []
    for shard in param_shards:
        if isinstance(engine, LowLevelZeroOptimizer) and shard.master is not shard.working:
            gradient = engine.get_working_grad_by_param_id(id(shard.working))
        else:
            gradient = shard.working.grad
        if gradient is not None:
            found.append((shard, gradient))
    return found
