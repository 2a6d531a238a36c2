"""Where the time of the iterations goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Timing"]


@final
@dataclass(slots=True)
class Timing:
    """Sums of seconds since the last look, and over the whole run for an estimate of what is left.

    ``mark`` is when the iteration under way began to wait for its data.
    """

    mark: float = 0.0
    waited: float = 0.0
    passed: float = 0.0
    count: int = 0
    passed_in_all: float = 0.0
    count_in_all: int = 0

    def take(self) -> tuple[float, float] | None:
        """Return the mean time of an iteration and of its waiting for data since the last call, and start anew."""
        if self.count == 0:
            return None
        means = self.passed / self.count, self.waited / self.count
        self.passed_in_all += self.passed
        self.count_in_all += self.count
        self.waited, self.passed, self.count = 0.0, 0.0, 0
        return means

    def left(self, iterations: int) -> float | None:
        """Return how long so many more iterations will take at the mean speed of the run so far."""
        return self.passed_in_all / self.count_in_all * iterations if self.count_in_all else None
