"""The optimizer state of other ranks, if each parameter has its state on one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from stratagem.optim.probe import probe_copy
from stratagem.optim.whole_updates import state_owners
from stratagem.planning.trace import storage_bytes
from stratagem.utils.torch_private import step_function, without_global_step_hooks

__all__ = ["OtherRanksState", "other_ranks_state"]


@final
@dataclass(frozen=True, slots=True)
class OtherRanksState:
    """The bytes of the optimizer state that this rank does not store.

    Attributes:
        excess: what the rank with the most has more than this one.
        total: what all other ranks have, each parameter once.
    """

    excess: int
    total: int


def other_ranks_state(optimizers: Iterable[Optimizer], updated: Collection[Tensor]) -> OtherRanksState | None:
    """Return the optimizer state of other ranks, with fake tensors; None if no optimizer divides it by parameters.

    Args:
        optimizers: the optimizers, without ``MixedOptimizer``; each has updated its parameters.
        updated: the parameters that have been updated.
    """
    loads: Counter[tuple[Any, int]] = Counter()
    own: Counter[Any] = Counter()
    is_divided = False
    for optimizer in optimizers:
        owners = state_owners(optimizer)
        if owners is None:
            continue
        is_divided = True
        wanted = [[each for each in group["params"] if each in updated] for group in optimizer.param_groups]
        for parameter, nbytes in _state_sizes(optimizer, wanted):
            owner = owners.get(parameter)
            if owner is not None:
                loads[owner.key, owner.rank] += nbytes
                own[owner.key] += nbytes if owner.is_own else 0
    if not is_divided:
        return None
    most: dict[Any, int] = {}
    for (key, _), nbytes in loads.items():
        most[key] = max(most.get(key, 0), nbytes)
    excess = sum(nbytes - own[key] for key, nbytes in most.items())
    return OtherRanksState(excess=excess, total=loads.total() - own.total())


def _state_sizes(optimizer: Optimizer, parameters: list[list[Tensor]]) -> list[tuple[Tensor, int]]:
    """Return the bytes of the state that an update of whole parameters creates for each of them."""
    wholes = [[nn.Parameter(torch.zeros(each.shape, dtype=each.dtype)) for each in group] for group in parameters]
    if not any(wholes):
        return []
    probe: Any = probe_copy(optimizer, wholes)
    for whole in (each for group in wholes for each in group):
        whole.grad = torch.zeros_like(whole)
    with without_global_step_hooks():
        step_function(type(probe))(probe)
    return [
        (parameter, storage_bytes(each for each in tree_leaves(dict(probe.state[whole])) if isinstance(each, Tensor)))
        for group, copies in zip(parameters, wholes, strict=True)
        for parameter, whole in zip(group, copies, strict=True)
    ]
