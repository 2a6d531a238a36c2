"""Watch which parameters of a model are trainable, because users may freeze and unfreeze them during a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, final

from torch import nn

from stratagem.distributed import EventAgreement
from stratagem.errors import PlacementError
from stratagem.optim import BaseOptimWrapper
from stratagem.utils.names import some_names

__all__ = ["TrainableChange", "TrainableParameters"]

_requires_grad: Final[Callable[[nn.Parameter], bool]] = attrgetter("requires_grad")
# A model may alternate between two parts in every iteration, so the number of log lines is limited.
_MOST_LINES: Final = 20


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} {'parameter' if len(names) == 1 else 'parameters'}"


@final
@dataclass(frozen=True, slots=True)
class TrainableChange:
    """Parameters whose ``requires_grad`` has changed since the previous training step.

    Attributes:
        unfrozen: the names of the parameters that became trainable.
        frozen: the names of the parameters that were frozen.
    """

    unfrozen: tuple[str, ...]
    frozen: tuple[str, ...]

    def __str__(self) -> str:
        parts = [
            f"{_count(names)} {verb}: {some_names(names)}"
            for names, verb in ((self.unfrozen, "became trainable"), (self.frozen, "became frozen"))
            if names
        ]
        return "; ".join(parts)


@final
class TrainableParameters:
    """Detects changes of ``requires_grad`` between training steps, and prepares the placement for them.

    Attributes:
        unfrozen: the parameters that became trainable at some time.

    Args:
        model: the unwrapped model, after it was placed.
        wrappers: returns the optimizer wrappers of the model.
        apply: prepares the placement for a change, or raises if it cannot; called on every rank.
        logger: logs changes.
        fixed: whether the placement cannot follow any change, so whether an optimizer has the parameters is irrelevant.
    """

    def __init__(
        self,
        model: nn.Module,
        wrappers: Callable[[], Iterable[BaseOptimWrapper]],
        apply: Callable[[TrainableChange], None],
        logger: logging.Logger,
        *,
        fixed: bool = False,
    ) -> None:
        named = dict(model.named_parameters())
        self._names = list(named)
        self._parameters = list(named.values())
        self._wrappers = wrappers
        self._apply = apply
        self._logger = logger
        self._fixed = fixed
        self._agreement = EventAgreement()
        self._num_lines = 0
        self.unfrozen: set[nn.Parameter] = set()
        self._flags = self._read()

    def check(self) -> None:
        """Prepare the placement if the trainable parameters have changed; call it before each training step.

        Without a change, this reads one attribute per parameter and does not communicate.

        Raises:
            PlacementError: if not all ranks made the same change, no optimizer has the parameters that became trainable,
                or the placement does not support the change.
        """
        self._agreement.num_checks += 1
        if list(map(_requires_grad, self._parameters)) != self._flags:
            self._follow(self._difference())

    def check_update(self) -> None:
        """Check before an update instead of before a training step, after the backward pass of the iteration."""
        if list(map(_requires_grad, self._parameters)) != self._flags:
            self._follow(self._difference(), after_backward=True)

    def adopt(self) -> None:
        """Prepare the placement for a change that a checkpoint made on every rank, without a log line."""
        change = self._difference()
        self._note_unfrozen(change)
        self._flags = self._read()
        if change.unfrozen or change.frozen:
            self._apply(change)

    def describe(self) -> str | None:
        """Return a line about the trainable parameters if some are frozen; None if all are trainable."""
        frozen = [name for name, flag in zip(self._names, self._flags, strict=True) if not flag]
        if not frozen:
            return None
        trainable = [name for name, flag in zip(self._names, self._flags, strict=True) if flag]
        return (
            f"{len(trainable)} of {len(self._names)} parameters are trainable: {some_names(trainable) or 'none'}. Frozen: "
            f"{some_names(frozen)}."
        )

    def _read(self) -> list[bool]:
        return list(map(_requires_grad, self._parameters))

    def _difference(self) -> TrainableChange:
        changed = [
            (name, now)
            for name, now, before in zip(self._names, self._read(), self._flags, strict=True)
            if now != before
        ]
        return TrainableChange(
            tuple(name for name, now in changed if now), tuple(name for name, now in changed if not now)
        )

    def _follow(self, change: TrainableChange, *, after_backward: bool = False) -> None:
        completed = max((wrapper.inner_count for wrapper in self._wrappers()), default=0)
        iteration = completed if after_backward else completed + 1
        self._require_agreement(change, iteration)
        if not self._fixed:
            self._require_optimizer(change, iteration)
        self._apply(change)
        self._note_unfrozen(change)
        self._flags = self._read()
        self._num_lines += 1
        if self._num_lines <= _MOST_LINES:
            last = " Further changes are not logged." if self._num_lines == _MOST_LINES else ""
            self._logger.info("Iteration %d: %s.%s", iteration, change, last)

    def _note_unfrozen(self, change: TrainableChange) -> None:
        by_name = dict(zip(self._names, self._parameters, strict=True))
        self.unfrozen.update(by_name[name] for name in change.unfrozen)

    def _require_agreement(self, change: TrainableChange, iteration: int) -> None:
        posted = self._agreement.find_disagreement("\n".join([*change.unfrozen, "", *change.frozen]))
        if posted is None:
            return
        own = posted[self._agreement.rank]
        others = [str(rank) for rank, event in posted.items() if event != own]
        raise PlacementError(
            f"Iteration {iteration}: on rank {self._agreement.rank}, {change}, but rank {', '.join(others)} did not make the "
            "same change, so the ranks would train different parameters. Set requires_grad on every rank before the same "
            "iteration, and not under a condition that depends on the rank or its data."
        )

    def _require_optimizer(self, change: TrainableChange, iteration: int) -> None:
        held = {id(parameter) for wrapper in self._wrappers() for parameter in wrapper.model_parameters()}
        by_name = dict(zip(self._names, self._parameters, strict=True))
        missing = [name for name in change.unfrozen if id(by_name[name]) not in held]
        if missing:
            raise PlacementError(
                f"Iteration {iteration}: {_count(missing)} became trainable that no optimizer has, so training would never "
                f"update them: {some_names(missing)}. Call optimizer.add_param_group before you unfreeze them, or freeze them "
                "with requires_grad_(False) instead of freeze in paramwise_cfg: the optimizer then has them from the start."
            )
