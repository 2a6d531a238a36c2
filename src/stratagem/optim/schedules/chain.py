"""All schedules of one option of one optimizer, applied one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, final

from torch import Tensor
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils.names import did_you_mean

__all__ = ["Chain", "Link", "all_or_none", "chain_of"]

_ATTRIBUTE = "_stratagem_chains"


class Link(Protocol):
    """What a chain needs of a schedule: whether its range has begun, and what it makes of a value."""

    started: bool

    def transform(self, value: float, initial: float) -> float:
        """Return what a value becomes; ``initial`` is the value that the group began the run with."""


@final
class Chain:
    """The schedules of one group key, in order of construction.

    The value of a group is its first value (``initial_<key>``) after every schedule that has begun. It is computed from
    there each time, so nothing drifts, and the order of stepping does not matter.
    """

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        groups = optimizer.param_groups
        self.initial_key = f"initial_{key}"
        self.links: list[Link] = []
        # Loading a state replaces the optimizer's list of groups, so it is the optimizer that is kept.
        self._optimizer = optimizer
        # Momentum is the first beta of the Adam family.
        self._key = "betas" if key == "momentum" and "momentum" not in groups[0] and "betas" in groups[0] else key
        if key == "momentum" and self._key not in groups[0]:
            raise ConfigValueError(
                f"{type(optimizer).__name__} has neither momentum nor betas, so no schedule can change its momentum."
            )
        for number, group in enumerate(groups):
            if self._key not in group:
                known = [name for name in group if name != "params"]
                raise ConfigKeyError(
                    f"Parameter group {number} of {type(optimizer).__name__} has no {key!r}. {did_you_mean(key, known)}"
                )

        self._is_tensor = any(isinstance(group[self._key], Tensor) for group in groups)

    def begin(self, *, resumed: bool) -> None:
        """Remember the present value of each group as its first, where none is known yet.

        Raises:
            ConfigKeyError: if ``resumed`` and a group's first value is not known.
        """
        for number, group in enumerate(self._optimizer.param_groups):
            if self.initial_key in group:
                continue
            if resumed:
                raise ConfigKeyError(
                    f"last_step is given, but parameter group {number} has no {self.initial_key!r}, the value that the "
                    "run began with. Set it, or resume from a state_dict."
                )
            self._remember(group)

    def values(self) -> list[float]:
        """Return the present value of each group."""
        return [self._value(group) for group in self._optimizer.param_groups]

    def apply(self) -> None:
        """Write into each group what its schedules make of its first value."""
        for group in self._optimizer.param_groups:
            try:
                value = initial = group[self.initial_key]
            except KeyError:  # a group that was added later
                value = initial = self._remember(group)
            for link in self.links:
                if link.started:
                    value = link.transform(value, initial)
            if self._key == "betas":
                group["betas"] = (value, *group["betas"][1:])
            elif self._is_tensor:
                group[self._key].fill_(value)
            else:
                group[self._key] = value

    def _value(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0] if self._key == "betas" else group[self._key])

    def _remember(self, group: dict[str, Any]) -> float:
        group[self.initial_key] = value = self._value(group)
        return value


def chain_of(optimizer: Optimizer, key: str) -> Chain:
    """Return the chain of one option; the optimizer keeps it, so that it lives as long and no longer."""
    chains: dict[str, Any] = vars(optimizer).setdefault(_ATTRIBUTE, {})
    if key not in chains:
        chains[key] = Chain(optimizer, key)
    chain: Chain = chains[key]
    return chain


@contextmanager
def all_or_none(optimizer: Optimizer) -> Iterator[None]:
    """Take the schedules that a block built off the optimizer again if the block fails, and give its values back.

    Otherwise they would count twice once the block is tried again.
    """
    chains: dict[str, Chain] = vars(optimizer).setdefault(_ATTRIBUTE, {})
    before = {key: list(chain.links) for key, chain in chains.items()}
    try:
        yield
    except Exception:
        for key, chain in list(chains.items()):
            chain.links[:] = before.get(key, [])
            chain.apply()
            if key not in before:
                del chains[key]
                for group in optimizer.param_groups:
                    del group[chain.initial_key]
        raise
