"""Chains of schedulers that change the same option of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, final

from torch import Tensor
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils.names import did_you_mean

__all__ = ["Chain", "Link", "all_or_none", "chain_of", "record_references", "scale_option"]

# Attributes of the optimizer.
_ATTRIBUTE = "_stratagem_chains"
_REFERENCES = "_stratagem_references"


class Link(Protocol):
    """The interface of a scheduler in a chain."""

    started: bool

    def transform_group(self, value: float, initial: float, ratio: float, number: int) -> float:
        """Return the transformed value of a group.

        Args:
            value: the result of the previous schedulers in the chain.
            initial: the group's value at the start of the run.
            ratio: ``initial`` relative to the optimizer's own value, such as ``lr_mult``.
            number: the index of the group.
        """


@final
class Chain:
    """The schedulers of one parameter group option, in order of construction.

    The value of a group is its initial value (``initial_<key>``), transformed by all schedulers whose range has begun.
    Since each value is computed from the initial value, errors do not accumulate, and the order in which the schedulers
    advance does not matter.
    """

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        groups = optimizer.param_groups
        self.initial_key = f"initial_{key}"
        self.links: list[Link] = []
        # The optimizer's own value. A setting such as eta_max is multiplied by the ratio of each group's value to it.
        self._reference = 0.0
        # The index of a group with a nonzero value, and its ratio; together they determine the reference value after loading.
        self._anchor: tuple[int, float] | None = None
        # Loading a state replaces the optimizer's list of groups, so keep a reference to the optimizer.
        self._optimizer = optimizer
        # In the Adam family, the momentum is the first beta.
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
        """Record the current value of each group as its initial value, unless the group already has an initial value.

        Raises:
            ConfigKeyError: if ``resumed`` is True and a group has no initial value.
        """
        for number, group in enumerate(self._optimizer.param_groups):
            if self.initial_key in group:
                continue
            if resumed:
                raise ConfigKeyError(
                    f"last_step is specified, but parameter group {number} has no {self.initial_key!r}, the value at "
                    "the start of the run. Set it in the group, or load a state dict instead."
                )
            self._record_initial(group)
        if not self.links:
            self._choose_reference()

    def follow_loaded_values(self) -> None:
        """Recompute the reference value from the loaded initial values, so that the ratio of each group is unchanged."""
        if self._anchor is not None:
            number, ratio = self._anchor
            self._reference = self._optimizer.param_groups[number][self.initial_key] / ratio

    def values(self) -> list[float]:
        """Return the current value of each group."""
        return [self._value(group) for group in self._optimizer.param_groups]

    def apply(self) -> None:
        """Set the value of each group from its initial value and its schedulers."""
        reference = self._reference
        for number, group in enumerate(self._optimizer.param_groups):
            try:
                value = initial = group[self.initial_key]
            except KeyError:  # The group was added later.
                value = initial = self._record_initial(group)
            ratio = initial / reference if reference else 1.0
            for link in self.links:
                if link.started:
                    value = link.transform_group(value, initial, ratio, number)
            if self._key == "betas":
                group["betas"] = (value, *group["betas"][1:])
            elif self._is_tensor:
                group[self._key].fill_(value)
            else:
                group[self._key] = value

    def _choose_reference(self) -> None:
        initial = [float(group[self.initial_key]) for group in self._optimizer.param_groups]
        self._reference = _reference(self._optimizer, self._key, initial)
        valued = [number for number, value in enumerate(initial) if value]
        if valued and self._reference:
            # Prefer a group whose value equals the reference value.
            number = min(valued, key=lambda each: abs(initial[each] / self._reference - 1.0))
            self._anchor = (number, initial[number] / self._reference)

    def _value(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0] if self._key == "betas" else group[self._key])

    def _record_initial(self, group: dict[str, Any]) -> float:
        group[self.initial_key] = value = self._value(group)
        return value


def record_references(optimizer: Optimizer) -> None:
    """Record the defaults of an optimizer that was built from a configuration.

    The values of its groups are multiples of the defaults.
    """
    vars(optimizer)[_REFERENCES] = {key: value for key, value in optimizer.defaults.items() if _is_number(value)}


def scale_option(optimizer: Optimizer, groups: Sequence[dict[str, Any]], key: str, factor: float) -> None:
    """Multiply an option of all groups by a factor. The ratios of the groups, to which schedules apply, do not change."""
    reference = _reference(optimizer, key, [float(group[key]) for group in groups])
    for group in groups:
        group[key] = group[key] * factor
    vars(optimizer).setdefault(_REFERENCES, {})[key] = reference * factor


def _reference(optimizer: Optimizer, key: str, initial: Sequence[float]) -> float:
    """Return the reference value of an option, from which the ratio of each group is computed.

    A setting such as ``eta_max`` is multiplied by the ratio of a group. The reference value is the recorded value, the
    default if one of the groups has this value, or the largest initial value. It is 0 if neither the optimizer nor a
    group has a value.
    """
    recorded = vars(optimizer).get(_REFERENCES, {})
    default: Any = recorded.get(key, getattr(optimizer, "defaults", {}).get(key))
    if key == "betas" and default is not None:
        default = default[0]
    own = float(default) if _is_number(default) else 0.0
    if own and (key in recorded or own in initial or not any(initial)):
        return own
    return max(initial, key=abs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def chain_of(optimizer: Optimizer, key: str) -> Chain:
    """Return the chain of an option, which is stored as an attribute of the optimizer so that both have the same lifetime."""
    chains: dict[str, Any] = vars(optimizer).setdefault(_ATTRIBUTE, {})
    if key not in chains:
        chains[key] = Chain(optimizer, key)
    chain: Chain = chains[key]
    return chain


@contextmanager
def all_or_none(optimizer: Optimizer) -> Iterator[None]:
    """If the block raises, remove the schedulers that were built in it and restore the optimizer's values.

    Otherwise they would still apply when the block is retried.
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
