"""Where a run stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

__all__ = ["Position", "Progress"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What is done: whole epochs, iterations of the run, batches of the epoch that is under way, validation.

    ``validated`` is after how many iterations the last validation was; -1 where there was none.
    """

    epoch: int = 0
    iter: int = 0
    batch: int = 0
    validated: int = -1

    def in_batches_of(self, new: int, old: int) -> Position:
        """Return the position for batches of another size over all ranks: the same samples of the epoch are done.

        Where they are no whole number of new batches, those beyond the last whole one are seen again.
        """
        return replace(self, batch=self.batch * old // new)

    def as_meta(self) -> dict[str, int]:
        """Return it as a checkpoint's ``meta`` has it."""
        return {
            "epoch": self.epoch, "iter": self.iter, "batch_in_epoch": self.batch, "validated_iter": self.validated,
        }  # fmt: skip

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Position:
        """Read it from a checkpoint's ``meta``; what is missing was not done."""
        return cls(
            epoch=int(meta.get("epoch", 0)),
            iter=int(meta.get("iter", 0)),
            batch=int(meta.get("batch_in_epoch", 0)),
            validated=int(meta.get("validated_iter", -1)),
        )


@final
@dataclass(slots=True, kw_only=True)
class Progress:
    """Counts what is done while a run goes on. The loop writes it, hooks read it.

    During an iteration ``iter`` and ``batch`` do not count it yet, nor does ``epoch`` an epoch before its end.
    """

    epoch: int = 0
    iter: int = 0
    batch: int = 0
    validated: int = -1
    max_epochs: int | None = None
    max_iters: int | None = None
    max_steps: int | None = None
    epoch_length: int | None = None
    stop_training: bool = False

    def here(self) -> Position:
        """Return what is done between two iterations."""
        return Position(epoch=self.epoch, iter=self.iter, batch=self.batch, validated=self.validated)

    def after_this_iteration(self) -> Position:
        """Return what will be done when the iteration that is under way has ended."""
        return replace(self.here(), iter=self.iter + 1, batch=self.batch + 1)

    def after_this_epoch(self) -> Position:
        """Return what will be done when the epoch whose last iteration is done has ended."""
        return replace(self.here(), epoch=self.epoch + 1, batch=0)

    def end_of_epochs(self) -> int | None:
        """Return how many iterations a run by epochs will have had at its end; None where that is not known.

        Batches that were passed over, or were of another size, are no iterations of the run.
        """
        if self.max_epochs is None or self.epoch_length is None:
            return None
        return self.iter + (self.max_epochs - self.epoch) * self.epoch_length - self.batch

    def move_to(self, position: Position) -> None:
        """Take up a position that was saved."""
        self.epoch, self.iter, self.batch = position.epoch, position.iter, position.batch
        self.validated = position.validated
