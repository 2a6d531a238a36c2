"""Read and write the state of optimizer wrappers under the parameter names of the unwrapped model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter, tree_map_only

from stratagem.checkpoint import ShardedTensorState, TensorBox, optimizer_by_index, optimizer_by_name, parameter_names
from stratagem.distributed import all_gather_object
from stratagem.errors import CheckpointMismatchError
from stratagem.optim import OptimWrapperDict
from stratagem.optim.base import TRAINING_WEIGHT
from stratagem.optim.mixed import PART, MixedOptimizer, parts_of
from stratagem.optim.optimizer_class import continues_equally, describe_difference, optimizer_class
from stratagem.optim.whole_updates import divides_state
from stratagem.parallel import AnyOptim
from stratagem.tensors.dtensor import copy_into, is_plain, is_sharded, shard_like, to_local
from stratagem.utils.names import some_names
from stratagem.utils.torch_private import storage_id

__all__ = [
    "read_optim",
    "require_one_optimizer",
    "require_same_class",
    "require_same_parts",
    "whole_optim_state",
    "write_optim",
]

logger = logging.getLogger(__name__)
_STEP: Final = "step"


def read_optim(optim: AnyOptim, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer state, keyed by parameter name; for several optimizers, a dict from optimizer names to states."""
    if isinstance(optim, OptimWrapperDict):
        return {name: read_optim(wrapper, model) for name, wrapper in optim.items()}
    state = optim.state_dict()
    if any(map(divides_state, parts_of(optim.optimizer).values())):
        state = {**state, "state": _with_states_of_all_ranks(state["state"])}
    return optimizer_by_name(state, parameter_names(optim.optimizer, model))


def _with_states_of_all_ranks(own: Mapping[int, Any]) -> dict[int, Any]:
    """Return the states of all parameters, of which each rank has some. Collective.

    Each tensor is a ``ShardedTensorState`` that contains all values on the ranks that have the state.
    """
    shown = {index: tree_map_only(Tensor, _TensorMeta.of, state) for index, state in own.items()}
    known = {index: state for each in reversed(all_gather_object(shown)) for index, state in each.items()}
    owned = {index: tree_map_only(Tensor, _as_one_box, state) for index, state in own.items()}
    absent = {
        index: tree_map_only(_TensorMeta, _TensorMeta.absent, state)
        for index, state in known.items()
        if index not in owned
    }
    return dict(sorted({**absent, **owned}.items()))


@final
@dataclass(frozen=True, slots=True)
class _TensorMeta:
    """The dtype and shape of a tensor, and the value if it has no dimensions."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _TensorMeta:
        return cls(tensor.dtype, tuple(tensor.shape), None if tensor.ndim else tensor.cpu())

    def absent(self) -> Tensor | ShardedTensorState:
        """Return the entry of a rank that does not have the tensor."""
        return self.value if self.value is not None else ShardedTensorState.empty(self.dtype, self.shape)


def _as_one_box(tensor: Tensor) -> Tensor | ShardedTensorState:
    """Return the entry of a rank that has the whole tensor, or a shard if the state has just been loaded."""
    if not tensor.ndim or is_sharded(tensor):
        return tensor
    return ShardedTensorState(tensor.dtype, tensor.shape, {TensorBox.whole(tensor.shape): tensor})


def whole_optim_state(optim: AnyOptim) -> dict[str, Any]:
    """Return ``optim.state_dict()`` with the states of all parameters on every rank.

    Collective if states are divided among the ranks; their tensors are then whole tensors in CPU memory.
    """
    if isinstance(optim, OptimWrapperDict):
        return {name: whole_optim_state(wrapper) for name, wrapper in optim.items()}
    state = optim.state_dict()
    if any(map(divides_state, parts_of(optim.optimizer).values())):
        combined = _with_states_of_all_ranks(state["state"])
        state["state"] = tree_map_only(ShardedTensorState, ShardedTensorState.full_tensor, combined)
    return state


def write_optim(
    optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str] = ()
) -> None:
    """Load a state from :func:`read_optim`, or from ``state_dict()`` of a torch optimizer, which has indices as keys.

    Args:
        optim: the optimizer wrapper or wrappers.
        state: the state.
        model: the unwrapped model.
        allow_missing: patterns of parameter names. Matching parameters may be missing and then start without state.

    Raises:
        CheckpointMismatchError: if the state belongs to different optimizers or parameter groups.
    """
    if isinstance(optim, OptimWrapperDict):
        names = list(optim.keys())
        if set(state) != set(names):
            raise CheckpointMismatchError(
                f"The checkpoint has optimizers {sorted(state)}, but this run has {sorted(names)}. Use the same names, or "
                "resume with resume_optimizer=False."
            )
        for name in names:
            write_optim(optim[name], state[name], model, allow_missing=allow_missing)
        return
    require_one_optimizer(state)
    names_here = parameter_names(optim.optimizer, model)
    by_index = optimizer_by_index(state, names_here, optim.optimizer.param_groups, allow_missing=allow_missing)
    parameters = [parameter for group in optim.optimizer.param_groups for parameter in group["params"]]
    casts = all(type(part).load_state_dict is Optimizer.load_state_dict for part in parts_of(optim.optimizer).values())
    kept: set[int] = set()
    writable = _separate_tensors(optim.optimizer)
    slots = {
        index: _placed_slots(saved, parameters[index], writable.get(parameters[index], {}), kept, casts=casts)
        for index, saved in by_index["state"].items()
    }
    optim.load_state_dict({**by_index, "state": slots})


def require_same_class(optim: AnyOptim, state: Mapping[str, Any]) -> None:
    """Require that a saved state belongs to optimizers of the same classes. Call this before anything is loaded.

    Without weight decay, Adam and AdamW compute the same updates, so each can continue from the state of the other.

    Raises:
        CheckpointMismatchError: if a class differs.
    """
    for name, wrapper in optim.each().items():
        saved = state.get(name) if name else state
        if not isinstance(saved, Mapping) or "param_groups" not in saved:
            continue  # write_optim reports missing optimizers
        own = optimizer_class(wrapper.optimizer)
        difference = describe_difference(wrapper.optimizer, saved)
        if difference is None:
            continue
        if continues_equally(wrapper.optimizer, saved):
            logger.info(
                "%s continues from the optimizer state in the checkpoint, although %s: without weight decay, both compute "
                "the same updates.",
                own,
                difference,
            )
            continue
        used = f"{own} for {name!r}" if name else own
        raise CheckpointMismatchError(
            f"This run uses the optimizer {used}, but the optimizer state in the checkpoint does not fit: {difference}. Use the "
            f"same optimizer, or set resume_optimizer=False to start {own} without a state."
        )


def require_same_parts(optim: AnyOptim, state: Mapping[str, Any], model: nn.Module) -> None:
    """Require that a saved state has the parameters in the same parts of a mixed optimizer. Call this before anything is loaded.

    Raises:
        CheckpointMismatchError: if a parameter belongs to another part.
    """
    for name, wrapper in optim.each().items():
        saved = state.get(name) if name else state
        if not isinstance(wrapper.optimizer, MixedOptimizer) or not isinstance(saved, Mapping):
            continue
        groups = saved.get("param_groups", ())
        before = {each: group.get(PART) for group in groups for each in group["params"] if isinstance(each, str)}
        names = parameter_names(wrapper.optimizer, model)
        now = {
            each: group[PART]
            for group, some in zip(wrapper.optimizer.param_groups, names, strict=True)
            for each in some
        }
        moved = [each for each in now if each in before and before[each] != now[each]]
        if moved:
            shown = some_names([f"{each} (checkpoint: {before[each]}, this run: {now[each]})" for each in moved], 3)
            raise CheckpointMismatchError(
                f"{len(moved)} of {len(now)} parameters belong to another part of the MixedOptimizer than in the checkpoint: "
                f"{shown}. Use hidden_matrices, others and rules as in the configuration of the checkpoint, or set "
                "resume_optimizer=False to start the optimizer without a state."
            )


def require_one_optimizer(state: Mapping[str, Any]) -> None:
    """Require that ``state`` belongs to a single optimizer.

    Raises:
        CheckpointMismatchError: if the state belongs to several optimizers.
    """
    if "param_groups" not in state:
        raise CheckpointMismatchError(
            "The optimizer state in the checkpoint belongs to several optimizers "
            f"({', '.join(sorted(map(str, state)))}), but this run has one optimizer. Resume with "
            "resume_optimizer=False."
        )


def _separate_tensors(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state tensors that share their memory neither with each other nor with parameters, by parameter and key."""
    tensors = [each for group in optimizer.param_groups for each in group["params"]]
    tensors += [each for each in tree_iter(list(optimizer.state.values())) if isinstance(each, Tensor)]
    uses = Counter(storage_id(to_local(each)) for each in tensors if each.layout is torch.strided)
    return {
        parameter: {
            key: value
            for key, value in slots.items()
            if isinstance(value, Tensor) and value.layout is torch.strided and uses[storage_id(to_local(value))] == 1
        }
        for parameter, slots in optimizer.state.items()
        if isinstance(parameter, Tensor)
    }


def _placed_slots(
    saved: Mapping[str, Any], parameter: nn.Parameter, own: Mapping[str, Any], kept: set[int], *, casts: bool
) -> dict[str, Any]:
    return {key: _placed(value, parameter, key, own.get(key), kept, casts=casts) for key, value in saved.items()}


@torch.no_grad()
def _placed(value: Any, parameter: nn.Parameter, key: str, own: Any, kept: set[int], *, casts: bool) -> Any:
    """Return a value where the optimizer keeps it, without further copies when the optimizer loads it.

    A moment is copied into the tensor that the optimizer already has, or to new memory on the device of its parameter; if the
    checkpoint was read to memory instead of being mapped, the optimizer keeps its tensor. A sharded moment is sharded like its
    parameter, and each rank reads only its shard.

    Args:
        value: the saved value.
        parameter: the parameter that it belongs to.
        key: its key in the state of the parameter.
        own: the optimizer's current tensor; None if it has none, or if other tensors share its memory.
        kept: the addresses of the tensors of the checkpoint that the optimizer keeps; extended here.
        casts: whether the optimizer converts state to the dtype of floating-point parameters, as torch's do.
    """
    if not isinstance(value, Tensor):
        return value
    if key == _STEP:
        return value.clone()  # the optimizer determines the device of its step count
    if key == TRAINING_WEIGHT:
        # Training weights are copied into the parameters, so they must be sharded in the same way.
        return shard_like(value, parameter, copy=True) if is_sharded(parameter) else value.clone()
    sharded = is_sharded(parameter) and value.shape == parameter.shape and not is_sharded(value)
    dtype = parameter.dtype if casts and parameter.is_floating_point() else value.dtype
    if _can_hold(own, value, parameter.device, dtype) and is_sharded(own) == (sharded or is_sharded(value)):
        copy_into(own, value)
        return own
    if sharded:
        return shard_like(value, parameter, copy=True)
    keep = _has_separate_memory(value) and value.data_ptr() not in kept
    if keep:
        kept.add(value.data_ptr())
    if casts:
        return value.to(device=parameter.device, dtype=dtype, copy=not keep)
    return value if keep else value.clone()


def _has_separate_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is neither memory-mapped nor a view of a part of another tensor."""
    if not is_plain(tensor) or tensor.layout != torch.strided or not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    # The storage of a mapped file cannot be resized.
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _can_hold(own: Any, value: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a value can be copied into a state tensor, which must not be a part of a larger tensor."""
    if not isinstance(own, Tensor) or own.layout is not torch.strided or own.requires_grad:
        return False
    if (own.shape, own.dtype, own.device, value.layout) != (value.shape, dtype, device, torch.strided):
        return False
    local = to_local(own)
    return local.untyped_storage().nbytes() == local.numel() * local.element_size()
