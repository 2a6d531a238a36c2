"""Run the unchanged step of any optimizer on whole tensors, although its parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from stratagem.tensors.dtensor import full_tensor, is_sharded, to_local
from stratagem.tensors.shard_transport import ShardLayout, ShardTransport, assign_owners, shard_group
from stratagem.utils.torch_private import step_function

__all__ = ["MATRIX_UPDATES", "MatrixUpdates", "StateOwner", "WholeUpdates", "divides_state", "state_owners"]

MatrixUpdates = Literal["owned", "gathered"]
MATRIX_UPDATES: Final = ("owned", "gathered")

# The updates of optimizers whose state is divided among the ranks, so that saving it is collective.
_DIVIDED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@final
@dataclass(slots=True)
class _Sharded:
    """A sharded parameter.

    Attributes:
        key: identifies the transport.
        layout: which part of it each rank stores.
        owner: the rank in its group that updates it, if the form is ``"owned"``.
        whole: the parameter that the optimizer sees instead. Between steps, it has no values.
    """

    key: Any
    layout: ShardLayout
    owner: int
    whole: nn.Parameter


@final
@dataclass(frozen=True, slots=True)
class StateOwner:
    """The rank that stores the optimizer state of a parameter.

    Attributes:
        key: identifies the group of ranks that the parameter is sharded across.
        rank: the rank in this group.
        is_own: whether it is this rank.
    """

    key: Any
    rank: int
    is_own: bool


@final
class WholeUpdates:
    """The step of an optimizer on whole tensors, with the same bits as in a single process.

    During a step, the parameter groups contain whole parameters with whole gradients. Afterwards, each rank keeps its shards.

    Args:
        form: ``"owned"``: each parameter is updated on one rank, which alone stores its optimizer state, in two all-to-all
            operations. The update of a parameter must not depend on other parameters. ``"gathered"``: every rank gathers and
            updates all parameters in one all-gather, and stores the whole optimizer state.
    """

    def __init__(self, form: MatrixUpdates) -> None:
        self._form = form
        self._transports: dict[Any, ShardTransport] = {}
        self._sharded: dict[Tensor, _Sharded] = {}
        # For each transport, the number of elements that each rank owns.
        self._loads: dict[Any, list[float]] = {}

    def register(self, optimizer: Optimizer) -> None:
        """Record that the state of an optimizer is divided among the ranks, if it is."""
        if self._form == "owned":
            _DIVIDED[optimizer] = self

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters. Collective."""
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self._place([each for each in parameters if is_sharded(each)])
        self._adopt_state(optimizer, parameters)
        active = [each for each in parameters if each.grad is not None]
        by_key: dict[Any, list[Tensor]] = {}
        for each in active:
            if each in self._sharded:
                by_key.setdefault(self._sharded[each].key, []).append(each)
        seen: dict[Tensor, nn.Parameter] = {}
        for key, some in by_key.items():
            self._collect(self._transports[key], some, seen)
        seen |= {each: _whole_of(each) for each in active if each not in self._sharded}
        with _replaced_parameters(optimizer, seen), torch.enable_grad():
            step_function(type(optimizer))(optimizer)
        for key, some in by_key.items():
            self._distribute(self._transports[key], some)
        for each, whole in seen.items():
            if each not in self._sharded and whole is not each:
                to_local(each).copy_(whole.data)

    def _collect(
        self, transport: ShardTransport, parameters: Sequence[Tensor], seen: dict[Tensor, nn.Parameter]
    ) -> None:
        """Give values and gradients to the whole parameters that this rank updates, and add these to ``seen``."""
        entries = [self._sharded[each] for each in parameters]
        layouts = [entry.layout for entry in entries]
        shards = [*map(to_local, parameters), *(_gradient(each) for each in parameters)]
        if self._form == "owned":
            owners = [entry.owner for entry in entries]
            wholes = transport.to_owners([*layouts, *layouts], shards, [*owners, *owners])
        else:
            wholes = [*transport.gather([*layouts, *layouts], shards)]
        count = len(parameters)
        for parameter, entry, value, gradient in zip(parameters, entries, wholes[:count], wholes[count:], strict=True):
            if value is not None and gradient is not None:
                device = to_local(parameter).device
                entry.whole.data = value.to(device)
                entry.whole.grad = gradient.to(device)
                seen[parameter] = entry.whole

    def _distribute(self, transport: ShardTransport, parameters: Sequence[Tensor]) -> None:
        """Copy the values of the whole parameters to the shards, and free them."""
        entries = [self._sharded[each] for each in parameters]
        if self._form == "owned":
            wholes = [entry.whole.data if entry.owner == transport.rank else None for entry in entries]
            parts = transport.from_owners(
                [entry.layout for entry in entries],
                wholes,
                [entry.owner for entry in entries],
                [each.dtype for each in parameters],
            )
        else:
            parts = [entry.layout.part(entry.whole.data, transport.rank) for entry in entries]
        for parameter, part in zip(parameters, parts, strict=True):
            to_local(parameter).copy_(part)
        for entry in entries:
            entry.whole.grad = None
            entry.whole.data = entry.whole.data.new_empty(0)

    def _place(self, parameters: Sequence[Tensor]) -> None:
        """Find the layouts and owners of parameters that are new. Collective if there are any."""
        groups: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if parameter not in self._sharded:
                group = shard_group(parameter)
                if group is not None:
                    groups.setdefault(group, []).append(parameter)
        for key, tensors in groups.items():
            if key not in self._transports:
                self._transports[key] = ShardTransport(*key)
                self._loads[key] = [0.0] * self._transports[key].size
            transport, loads = self._transports[key], self._loads[key]
            owners = assign_owners([float(each.numel()) for each in tensors], transport.size, loads)
            for tensor, layout, owner in zip(tensors, transport.layouts(tensors), owners, strict=True):
                loads[owner] += tensor.numel()
                empty = torch.empty(0, dtype=tensor.dtype, device=to_local(tensor).device)
                self._sharded[tensor] = _Sharded(key, layout, owner, nn.Parameter(empty))

    def owners(self) -> dict[Tensor, StateOwner]:
        """Return the owner of each parameter that has been updated."""
        return {
            parameter: StateOwner(
                key=entry.key, rank=entry.owner, is_own=entry.owner == self._transports[entry.key].rank
            )
            for parameter, entry in self._sharded.items()
        }

    def _adopt_state(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Gather state that is sharded, as after loading a checkpoint; discard the state of parameters of other ranks.

        Collective if there is sharded state, which is the same on all ranks.
        """
        for parameter in parameters:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if any(isinstance(each, Tensor) and is_sharded(each) for each in tree_iter(state)):
                gathered = tree_map_only(Tensor, full_tensor, dict(state))
                state.clear()
                state.update(gathered)
            entry = self._sharded.get(parameter)
            if entry is not None and self._form == "owned" and entry.owner != self._transports[entry.key].rank:
                del optimizer.state[parameter]


def divides_state(optimizer: Optimizer) -> bool:
    """Return whether the state of each parameter is stored on only one rank of those that the parameter is sharded across."""
    return optimizer in _DIVIDED


def state_owners(optimizer: Optimizer) -> dict[Tensor, StateOwner] | None:
    """Return which rank stores the state of each sharded parameter that has been updated; None if the state is not divided."""
    update = _DIVIDED.get(optimizer)
    return None if update is None else update.owners()


def _gradient(parameter: Tensor) -> Tensor:
    """Return this rank's shard of the gradient of a sharded parameter."""
    gradient: Any = parameter.grad
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return to_local(gradient)


def _whole_of(parameter: Tensor) -> nn.Parameter:
    """Return a parameter with all values of a tensor that is not divided: itself, or one for the values of a ``DTensor``."""
    if isinstance(parameter, nn.Parameter) and not is_sharded(parameter):
        return parameter
    whole = nn.Parameter(to_local(parameter))
    whole.grad = to_local(parameter.grad) if parameter.grad is not None else None
    return whole


@contextmanager
def _replaced_parameters(optimizer: Optimizer, wholes: Mapping[Tensor, nn.Parameter]) -> Iterator[None]:
    """Inside the ``with`` block, the optimizer has other parameters with the same state; those without one are omitted."""
    before = [group["params"] for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, before, strict=True):
        group["params"] = [wholes[each] for each in parameters if each in wholes]
    _move_state(optimizer, wholes)
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, before, strict=True):
            group["params"] = parameters
        _move_state(optimizer, {whole: parameter for parameter, whole in wholes.items()})


def _move_state(optimizer: Optimizer, names: Mapping[Any, Any]) -> None:
    for old, new in names.items():
        if old is not new and old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
