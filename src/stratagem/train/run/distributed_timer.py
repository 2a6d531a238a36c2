"""A timer that expires on all ranks after the same iteration."""

from __future__ import annotations

import time
from typing import Final, final

from stratagem.distributed import CheckAgreement, barrier

__all__ = ["DistributedTimer"]

# How often a rank looks whether the timer of another rank has expired.
_POLL_S: Final = 1.0


@final
class DistributedTimer:
    """A timer that expires on all ranks after the same iteration, without a collective per iteration.

    The caller increments ``num_checks`` at the same points on every rank, such as after each iteration. It calls :meth:`due`
    at these points if ``is_requested`` is set or ``deadline`` has passed; at any other check, a call would return False.

    Args:
        seconds: the duration.
        distributed: whether the run has several ranks.

    Attributes:
        num_checks: the number of checks that this rank has begun.
        is_requested: whether the timer of another rank has expired.
        deadline: the time at which the timer of this rank expires, in terms of ``time.monotonic``.
    """

    def __init__(self, seconds: float, *, distributed: bool) -> None:
        self._seconds = seconds
        self._distributed = distributed
        self._agreement: CheckAgreement | None = None
        self.num_checks = 0
        self.is_requested = self._is_due = False
        self.deadline = 0.0
        self._begin()

    def restart(self) -> None:
        """Restart the timer. Collective: every rank calls it after the same check."""
        if self._agreement is not None and self._is_due:
            self._agreement.close()
            self._begin()
        self.deadline = time.monotonic() + self._seconds

    def due(self) -> bool:
        """Return whether the timer has expired on all ranks. It may wait until all ranks know that it has expired on one of them.

        Raises:
            DistStoreError: if a rank does not answer within the timeout of the process group.
        """
        expired = time.monotonic() >= self.deadline
        if self._agreement is None or self._is_due:
            return expired or self._is_due
        if not (expired or self.is_requested):
            return False
        # From now on, call this method at every check until the timer has expired on all ranks, even after a restart.
        self.is_requested = True
        last_passed, _ = self._agreement.decide(() if expired else None)
        self._is_due = self.num_checks > last_passed
        return self._is_due

    def finish(self) -> None:
        """Wait for all ranks and stop the timer. Collective."""
        if self._agreement is not None:
            # A rank that has not passed its last check may still be waiting for an answer of this rank.
            barrier()
        self.close()

    def close(self) -> None:
        """Stop the timer of this rank, after an error or when all ranks have passed their last check. Idempotent."""
        if self._agreement is not None:
            self._agreement.close()
            self._agreement = None

    def _begin(self) -> None:
        self.num_checks = 0
        self.is_requested = self._is_due = False
        self.deadline = time.monotonic() + self._seconds
        if self._distributed:
            self._agreement = CheckAgreement("on when to save a checkpoint by time", self, poll_s=_POLL_S)
