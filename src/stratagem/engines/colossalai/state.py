"""Read and write the state of a model and optimizer wrapped by the booster, under the names of the unwrapped model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from stratagem.checkpoint import (
    LoadReport,
    ShardedTensorState,
    StateTree,
    match_state,
    optimizer_by_index,
    optimizer_by_name,
)
from stratagem.engines.colossalai.placement import ColossalAIPlacement
from stratagem.engines.colossalai.shard_layout import ParamShard
from stratagem.engines.colossalai.wrapper import BoosterOptimWrapper
from stratagem.errors import CheckpointError
from stratagem.optim import all_finite
from stratagem.parallel import AnyOptim
from stratagem.strategies.state.optim_state import require_one_optimizer
from stratagem.strategies.state.state_io import StateAccess

__all__ = ["ColossalAIState"]

# This value is not elementwise, even if its shape equals that of a scalar parameter.
_COUNTER: Final = "step"


@final
class ColossalAIState(StateAccess):
    """Read and write the optimizer's master weights instead of the model's parameters.

    The exact master weights are restored, so that a resumed bfloat16 run is bitwise identical. ColossalAI's own loading
    would compute the master weights from the rounded parameters.

    Args:
        placement: the placement whose booster wrapped the model.
    """

    def __init__(self, placement: ColossalAIPlacement) -> None:
        self._placement = placement

    def model_state(self, model: nn.Module) -> StateTree:
        return {name: self._stored(value) for name, value in self._entries(model)}

    def load_model_state(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        own = dict(self._entries(model))
        shapes = {name: self._full_shape(value) for name, value in own.items()}
        report, fitting = match_state(
            model, shapes, state, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing
        )
        extra = {}
        for name, value in fitting.items():
            if name not in own:
                continue
            here = own[name]
            if isinstance(here, nn.Parameter):
                shard = self._placement.param_shards[here]
                shard.write_full_working(value)
                if shard.master is not shard.working:
                    shard.write_full(value, shard.master)
            elif isinstance(here, Tensor):
                here.copy_(value)
            else:
                extra[name] = value
        if extra:
            model.load_state_dict(extra, strict=False)
        return report

    def optim_state(self, optim: AnyOptim, model: nn.Module) -> StateTree:
        wrapper = _require_wrapper(optim)
        state = wrapper.state_dict()
        param_shards = self._optimizer_shards(wrapper)
        slots = {
            shard.name: {key: self._stored_slot(key, value, shard) for key, value in state["state"][index].items()}
            for index, shard in enumerate(param_shards)
            if index in state["state"]
        }
        by_name = optimizer_by_name({**state, "state": {}}, self._placement.group_names)
        return {**by_name, "state": slots}

    def load_optim_state(
        self, optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str]
    ) -> None:
        wrapper = _require_wrapper(optim)
        names = self._placement.group_names
        require_one_optimizer(state)
        by_index = optimizer_by_index(state, names, wrapper.param_groups, allow_missing=allow_missing)
        # The saved indices count all parameters of the groups; the wrapped optimizer may have only the trainable
        # parameters.
        flat = [name for group in names for name in group]
        saved = {flat[index]: slots for index, slots in by_index["state"].items()}
        slots = {
            index: {key: _slot_for_shard(key, value, shard) for key, value in saved[shard.name].items()}
            for index, shard in enumerate(self._optimizer_shards(wrapper))
            if shard.name in saved
        }
        groups, first = [], 0
        for group, own in zip(by_index["param_groups"], wrapper.param_groups, strict=True):
            count = len(own["params"])
            groups.append({**group, "params": list(range(first, first + count))})
            first += count
        wrapper.load_state_dict({**by_index, "state": slots, "param_groups": groups})

    def weights_are_finite(self, model: nn.Module) -> bool:
        return all_finite(shard.master for shard in self._placement.param_shards.values())

    def _entries(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yield the entries of the state dict, with the parameters themselves as values."""
        if not self._placement.uses_tensor_parallel:
            yield from model.state_dict(keep_vars=True).items()
            return
        # The state_dict() of ColossalAI's tensor-parallel layers would gather their parameters.
        yield from model.named_parameters(remove_duplicate=False)
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer

    def _stored(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            shard = self._placement.param_shards[value]
            return shard.to_sharded_state(shard.master)
        return value.detach() if isinstance(value, Tensor) else value

    def _full_shape(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return torch.empty(self._placement.param_shards[value].shape, device="meta")
        return value

    def _stored_slot(self, key: str, value: Any, shard: ParamShard) -> Any:
        if not isinstance(value, Tensor) or key == _COUNTER or value.numel() == 1 != shard.master.numel():
            return value
        if value.shape == shard.master.shape:
            return shard.to_sharded_state(value)
        if shard.is_full:
            return value
        raise CheckpointError(
            f"The optimizer state {key} of {shard.name} has shape {list(value.shape)}, but this rank has {shard.count} "
            f"elements of the parameter of shape {list(shard.shape)}. Other strategies cannot load such a state. Use "
            "plugin='torch-ddp', or an elementwise optimizer such as AdamW."
        )

    def _optimizer_shards(self, wrapper: BoosterOptimWrapper) -> list[ParamShard]:
        """Return the shards that the optimizer updates, in its order."""
        of_master = {id(shard.master): shard for shard in self._placement.param_shards.values()}
        return [of_master[id(master)] for group in wrapper.param_groups for master in group["params"]]


def _require_wrapper(optim: AnyOptim) -> BoosterOptimWrapper:
    if not isinstance(optim, BoosterOptimWrapper):
        raise CheckpointError(f"{type(optim).__name__} is not the optimizer wrapper that ColossalAIStrategy prepared.")
    return optim


def _slot_for_shard(key: str, value: Any, shard: ParamShard) -> Any:
    """Return a copy of a value; for an elementwise tensor, only this rank's shard."""
    if not isinstance(value, Tensor | ShardedTensorState):
        return value
    if key == _COUNTER or (isinstance(value, Tensor) and value.shape != shard.shape):
        return value.clone() if isinstance(value, Tensor) else value
    own = torch.zeros_like(shard.master, dtype=value.dtype)
    shard.write_full(value, own)
    return own
