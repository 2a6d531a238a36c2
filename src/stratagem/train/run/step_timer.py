"""Where the time of the iterations goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["StepTimer"]


@final
@dataclass(slots=True)
class StepTimer:
    """Sums of seconds since the last look, and over the whole run for an estimate of what is left.

    ``started`` is when the iteration under way began to wait for its data.
    """

    started: float = 0.0
    data_seconds: float = 0.0
    seconds: float = 0.0
    count: int = 0
    total_seconds: float = 0.0
    total_count: int = 0

    def pop_means(self) -> tuple[float, float] | None:
        """Return the mean time of an iteration and of its waiting for data since the last call, and start anew."""
        if self.count == 0:
            return None
        means = self.seconds / self.count, self.data_seconds / self.count
        self.total_seconds += self.seconds
        self.total_count += self.count
        self.data_seconds, self.seconds, self.count = 0.0, 0.0, 0
        return means

    def eta(self, iterations: int) -> float | None:
        """Return how long so many more iterations will take at the mean speed of the run so far."""
        return self.total_seconds / self.total_count * iterations if self.total_count else None
