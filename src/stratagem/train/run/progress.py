"""Progress of a run: completed epochs and iterations, and the time that iterations take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

__all__ = ["Position", "Progress", "StepTimer"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position in a run: the state of :class:`Progress` that checkpoints contain.

    Attributes:
        epoch: completed epochs.
        iter: completed iterations of the run.
        batch: consumed batches of the current epoch.
        validated: the number of iterations at the last validation; -1 if there was none.
    """

    epoch: int = 0
    iter: int = 0
    batch: int = 0
    validated: int = -1

    def in_batches_of(self, new: int, old: int) -> Position:
        """Convert the position to a different global batch size, so that it follows the same samples of the epoch.

        The number of batches is rounded down, so up to one batch of samples is repeated.
        """
        return replace(self, batch=self.batch * old // new)

    def as_meta(self) -> dict[str, int]:
        """Return the entries for the ``meta`` of a checkpoint."""
        return {
            "epoch": self.epoch, "iter": self.iter, "batch_in_epoch": self.batch, "validated_iter": self.validated,
        }  # fmt: skip

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Position:
        """Read a position from the ``meta`` of a checkpoint; missing entries get the defaults."""
        return cls(
            epoch=int(meta.get("epoch", 0)),
            iter=int(meta.get("iter", 0)),
            batch=int(meta.get("batch_in_epoch", 0)),
            validated=int(meta.get("validated_iter", -1)),
        )


@final
@dataclass(slots=True, kw_only=True)
class Progress:
    """Counters and length of a run. The loop updates them; hooks read them.

    The current iteration is not included in ``iter`` and ``batch`` until its hooks have run. The same applies to ``epoch``.

    Attributes:
        stop_training: set by hooks to stop after the current iteration, epoch or validation. If only some ranks set it during
            an iteration, all ranks stop after the next one.
        in_iteration: whether a training step or one of its hooks is running.
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
    in_iteration: bool = False

    def here(self) -> Position:
        """Return the current position. Call this between two iterations."""
        return Position(epoch=self.epoch, iter=self.iter, batch=self.batch, validated=self.validated)

    def after_this_iteration(self) -> Position:
        """Return the position after the current iteration."""
        return replace(self.here(), iter=self.iter + 1, batch=self.batch + 1)

    def after_this_epoch(self) -> Position:
        """Return the position after the current epoch, whose last iteration is complete."""
        return replace(self.here(), epoch=self.epoch + 1, batch=0)

    def end_of_epochs(self) -> int | None:
        """Return the total number of iterations of a run measured in epochs, or None if it is unknown.

        The total is computed from the current position, because skipped batches and a changed batch size change it.
        """
        if self.max_epochs is None or self.epoch_length is None:
            return None
        # The length may have changed since the epoch began.
        return self.iter + (self.max_epochs - self.epoch) * self.epoch_length - min(self.batch, self.epoch_length)

    def move_to(self, position: Position) -> None:
        """Set the counters to a position, for example the position in a checkpoint."""
        self.epoch, self.iter, self.batch = position.epoch, position.iter, position.batch
        self.validated = position.validated


@final
@dataclass(slots=True)
class StepTimer:
    """Accumulates iteration times: since the last :meth:`pop_means`, and in total, to estimate the remaining time.

    Attributes:
        started: when the current iteration started, in seconds of ``time.perf_counter``: right after the previous step.
        waiting_since: when the loop started to wait for the next batch. The loop sets it, after all hooks have run.
        data_seconds: time that the loop spent waiting for batches; 0 if the loop does not measure it.
        seconds: duration of the iterations, including hooks and the time spent waiting for batches.
        count: number of iterations.
        total_seconds: ``seconds`` before the last :meth:`pop_means`.
        total_count: ``count`` before the last :meth:`pop_means`.
        total_data_seconds: ``data_seconds`` before the last :meth:`pop_means`.
    """

    started: float = 0.0
    waiting_since: float = 0.0
    data_seconds: float = 0.0
    seconds: float = 0.0
    count: int = 0
    total_seconds: float = 0.0
    total_count: int = 0
    total_data_seconds: float = 0.0

    @property
    def all_data_seconds(self) -> float:
        """The time that the loop has spent waiting for batches so far."""
        return self.total_data_seconds + self.data_seconds

    def pop_means(self) -> tuple[float, float] | None:
        """Return the mean duration of an iteration and its mean wait for a batch, and reset both; None without iterations."""
        if self.count == 0:
            return None
        means = self.seconds / self.count, self.data_seconds / self.count
        self.total_seconds += self.seconds
        self.total_count += self.count
        self.total_data_seconds += self.data_seconds
        self.data_seconds, self.seconds, self.count = 0.0, 0.0, 0
        return means

    def eta(self, iterations: int) -> float | None:
        """Return the estimated time in seconds for a number of additional iterations, or None before the first measurement."""
        return self.total_seconds / self.total_count * iterations if self.total_count else None
