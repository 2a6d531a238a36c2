"""Read and write the state of a model and its optimizer in DeepSpeed's engine, under the names of the unwrapped model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.checkpoint import (
    LoadReport,
    ShardedTensorState,
    StateTree,
    match_state,
    optimizer_by_index,
    optimizer_by_name,
    take_range,
)
from stratagem.engines.deepspeed.master_weights import ShardRange
from stratagem.engines.deepspeed.placement import DeepSpeedPlacement
from stratagem.engines.deepspeed.wrapper import DeepSpeedEngineOptimWrapper
from stratagem.errors import CheckpointMismatchError
from stratagem.optim import all_finite
from stratagem.parallel import AnyOptim
from stratagem.strategies.state.optim_state import require_one_optimizer
from stratagem.strategies.state.state_io import StateAccess
from stratagem.utils import named_parameters

__all__ = ["DeepSpeedState"]

# Optimizer state that is not elementwise, even for tensors with a single element.
_PER_TENSOR: Final = frozenset({"step", "mu", "eta", "mu_product"})


@final
class DeepSpeedState(StateAccess):
    """Read and write the engine's float32 master weights and moments.

    Args:
        placement: the placement that created the engine.
    """

    def __init__(self, placement: DeepSpeedPlacement) -> None:
        self._placement = placement

    def model_state(self, model: nn.Module) -> StateTree:
        return {name: self._read(value) for name, value in model.state_dict(keep_vars=True).items()}

    def load_model_state(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        own = model.state_dict(keep_vars=True)
        parameters = {name: value for name, value in own.items() if isinstance(value, nn.Parameter)}
        full_shapes = {name: torch.empty(full_shape(each), device="meta") for name, each in parameters.items()}
        report, values = match_state(
            model, {**own, **full_shapes}, state, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing
        )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in values:
                    self._write(parameter, values[name])
        rest = {name: value for name, value in values.items() if name in own and name not in parameters}
        model.load_state_dict(rest, strict=False)
        if self._placement.master_weights is not None:
            self._placement.master_weights.update_model_params()
        return report

    def optim_state(self, optim: AnyOptim, model: nn.Module) -> StateTree:
        own = cast("DeepSpeedEngineOptimWrapper", optim)
        parameters = [each for group in own.groups for each in group.parameters]
        index_of = {each: index for index, each in enumerate(parameters)}
        slots = {
            index_of[each]: self._slots(own, each, shard_range)
            for each, shard_range in own.master_weights.shard_ranges.items()
        }
        by_index = {
            **own.state_dict(),
            "state": {index: slots[index] for index in sorted(slots) if slots[index]},
            "param_groups": [
                {**group.options, "params": [index_of[each] for each in group.parameters]} for group in own.groups
            ],
        }
        return optimizer_by_name(by_index, _names(own, model))

    def load_optim_state(
        self, optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str]
    ) -> None:
        own = cast("DeepSpeedEngineOptimWrapper", optim)
        require_one_optimizer(state)
        names = _names(own, model)
        by_index = optimizer_by_index(
            state, names, [group.options for group in own.groups], allow_missing=allow_missing
        )
        parameters = [each for group in own.groups for each in group.parameters]
        flat_names = [name for group in names for name in group]
        saved = {each: (flat_names[index], by_index["state"].get(index) or {}) for index, each in enumerate(parameters)}
        for flat, owners in _by_flat(own.master_weights.shard_ranges):
            slots = {each: saved[each] for each in owners}
            _write_slots(own.optimizer.state, flat, owners, slots)
            flat_slots = own.optimizer.state.get(flat, {})
            if "step" in flat_slots:
                is_integer = _counts_steps_as_int(own.optimizer)
                flat_slots["step"] = (
                    int(flat_slots["step"]) if is_integer else _to_torch_format("step", flat_slots["step"])
                )
        for group, options in zip(own.groups, by_index["param_groups"], strict=True):
            group.options.update({key: value for key, value in options.items() if key not in ("params", "param_names")})
        own.load_counts(state)

    def weights_are_finite(self, model: nn.Module) -> bool:
        master_weights = self._placement.master_weights
        flats = [] if master_weights is None else [flat.detach() for flat in master_weights.flats()]
        trained = {} if master_weights is None else master_weights.shard_ranges
        rest = [local_values(each)[0] for each in model.parameters() if each not in trained]
        return all_finite([*flats, *rest])

    def _read(self, value: Any) -> Any:
        if not isinstance(value, nn.Parameter):
            return value.detach() if isinstance(value, Tensor) else value
        master_weights = self._placement.master_weights
        shard_range = None if master_weights is None else master_weights.shard_ranges.get(value)
        shape = full_shape(value)
        if master_weights is not None and shard_range is not None:
            return (
                _shard_state(shard_range, shard_range.flat, shape)
                if master_weights.sharded
                else shard_range.flat.detach()
            )
        values, start = local_values(value)
        return values if values.shape == shape else ShardedTensorState.from_flat_range(values, start, shape)

    def _write(self, parameter: nn.Parameter, value: Tensor | ShardedTensorState) -> None:
        master_weights = self._placement.master_weights
        shard_range = None if master_weights is None else master_weights.shard_ranges.get(parameter)
        if master_weights is None or shard_range is None:
            target, start = local_values(parameter)
        elif master_weights.sharded:
            target, start = shard_range.of(shard_range.flat), shard_range.start
        else:
            target, start = shard_range.flat.detach(), 0
        target.copy_(take_range(value, start, start + target.numel()).view(target.shape))

    def _slots(
        self, optim: DeepSpeedEngineOptimWrapper, parameter: nn.Parameter, shard_range: ShardRange
    ) -> dict[str, Any]:
        """Return the optimizer state of a parameter. State that is not elementwise belongs to the whole flat tensor."""
        shape = full_shape(parameter)
        state = optim.optimizer.state.get(shard_range.flat, {})
        return {
            key: _shard_state(shard_range, value, shape)
            if optim.master_weights.sharded and _is_elementwise(key, value, shard_range.flat.shape)
            else _to_torch_format(key, value)
            for key, value in state.items()
        }


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the full shape of a parameter, of which each rank has only a shard in stage 3."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def local_values(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Return this rank's values of a parameter without master weights, and the index of the first one."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach(), 0
    start = min(part.numel() * torch.distributed.get_rank(), cast("Any", parameter).ds_numel)
    return part.detach().view(-1)[: cast("Any", parameter).ds_numel - start], start


def _shard_state(shard_range: ShardRange, tensor: Tensor, shape: torch.Size) -> ShardedTensorState:
    """Return a parameter's shard from a tensor with the layout of ``shard_range.flat``."""
    values = shard_range.of(tensor)
    return (
        ShardedTensorState.from_flat_range(values, shard_range.start, shape)
        if values.numel()
        else ShardedTensorState.empty(values.dtype, shape)
    )


def _is_elementwise(key: str, value: Any, shape: torch.Size) -> bool:
    return key not in _PER_TENSOR and isinstance(value, Tensor | ShardedTensorState) and value.shape == shape


def _names(optim: DeepSpeedEngineOptimWrapper, model: nn.Module) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [
        [known.get(id(each), f"unnamed.{index}.{place}") for place, each in enumerate(group.parameters)]
        for index, group in enumerate(optim.groups)
    ]


def _by_flat(
    shard_ranges: Mapping[nn.Parameter, ShardRange],
) -> Iterator[tuple[Tensor, dict[nn.Parameter, ShardRange]]]:
    flats: dict[int, tuple[Tensor, dict[nn.Parameter, ShardRange]]] = {}
    for parameter, shard_range in shard_ranges.items():
        flats.setdefault(id(shard_range.flat), (shard_range.flat, {}))[1][parameter] = shard_range
    yield from flats.values()


def _write_slots(
    state: dict[Tensor, Any],
    flat: Tensor,
    owners: Mapping[nn.Parameter, ShardRange],
    saved: Mapping[nn.Parameter, tuple[str, Mapping[str, Any]]],
) -> None:
    """Write the moments of all parameters in a flat tensor; parameters without saved moments get zeros."""
    given = {each: slots for each, (_, slots) in saved.items() if slots}
    if not given:
        state.pop(flat, None)
        return
    flat_slots = state.setdefault(flat, {})
    for key in dict.fromkeys(key for slots in given.values() for key in slots):
        values = {each: slots[key] for each, slots in given.items() if slots.get(key) is not None}
        if not values:
            flat_slots[key] = None
            continue
        if not all(_is_elementwise(key, value, full_shape(each)) for each, value in values.items()):
            value = _require_equal(key, {saved[each][0]: value for each, value in values.items()})
            flat_slots[key] = value.to(flat.device) if isinstance(value, Tensor) else value
            continue
        dtype = next(iter(values.values())).dtype
        if not isinstance(flat_slots.get(key), Tensor):
            flat_slots[key] = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
        flat_slots[key].zero_()
        for each, value in values.items():
            shard_range = owners[each]
            part = take_range(value, shard_range.start, shard_range.start + shard_range.count)
            # The tensor is not sharded and may have any strides.
            target = (
                flat_slots[key] if shard_range.count == flat_slots[key].numel() else shard_range.of(flat_slots[key])
            )
            target.copy_(part.view(target.shape))


def _require_equal(key: str, values: Mapping[str, Any]) -> Any:
    """Return the value of a key that must be equal for all parameters in one flat tensor."""
    (first_name, first), *others = values.items()
    for name, value in others:
        if not bool(torch.as_tensor(value == first).all()):
            raise CheckpointMismatchError(
                f"The optimizer state {key!r} is {_shown(first)} for {first_name!r} and {_shown(value)} for {name!r}, but "
                "DeepSpeed updates both together. Put them into separate groups with paramwise_cfg, or resume with "
                "resume_optimizer=False."
            )
    return first.clone() if isinstance(first, Tensor) else first


def _counts_steps_as_int(optimizer: Optimizer) -> bool:
    """Return whether an optimizer belongs to DeepSpeed, whose kernels take the number of steps as an integer."""
    return type(optimizer).__module__.startswith("deepspeed.")


def _to_torch_format(key: str, value: Any) -> Any:
    """Return a value with the type that torch's optimizers use, so that they can resume from it."""
    return torch.tensor(float(value)) if key == "step" and isinstance(value, int) else value


def _shown(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
