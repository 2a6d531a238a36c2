"""Store a curve of any length in bounded memory, with the range of the values that were combined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, final

__all__ = ["Curve", "rounded"]

# A curve has at most this many points. If there are more, neighbors are combined, so at least half as many remain.
_MOST_POINTS: Final = 800  # An even number, so that all points consist of equal numbers of values.
# At most this many positions of NaN and Inf, and this many discarded points, are kept.
_MOST_MARKS: Final = 200
_DIGITS: Final = 7


@final
@dataclass(slots=True)
class _Point:
    """Consecutive values: the last position, and the sum, number, minimum and maximum of the finite values."""

    first: float
    last: float
    total: float
    count: int
    low: float
    high: float

    def absorb(self, other: _Point) -> None:
        self.last = other.last
        self.total += other.total
        self.count += other.count
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)


@final
@dataclass(slots=True)
class Curve:
    """The values of one name over the iterations.

    If there are too many values, equal numbers of consecutive ones are combined to their mean, minimum and maximum. NaN and Inf
    are not part of them, but counted and marked. Values that a rollback has discarded form separate, shorter curves.

    Attributes:
        count: the number of values.
        nonfinite: the number of values that are NaN or Inf.
    """

    count: int = 0
    nonfinite: int = 0
    _points: list[_Point] = field(default_factory=list)
    _size: int = 1
    _in_last: int = 0
    _marks: list[float] = field(default_factory=list)
    _discarded: list[list[_Point]] = field(default_factory=list)

    def add(self, x: float, value: float) -> None:
        """Append a value. If ``x`` is smaller than before, the values from there on were discarded by a rollback."""
        points = self._points
        if points and x <= points[-1].last:
            self._rewind(x)
        self.count += 1
        if self._in_last < self._size and points:
            last = points[-1]
            last.last = x
            self._in_last += 1
            if math.isfinite(value):
                last.total += value
                last.count += 1
                if value < last.low:  # noqa: PLR1730 -- faster than min() and max()
                    last.low = value
                if value > last.high:  # noqa: PLR1730
                    last.high = value
            else:
                self._mark(x)
            return
        if len(points) >= _MOST_POINTS:
            self._points = points = _combined(points)
            self._size *= 2
        if math.isfinite(value):
            points.append(_Point(x, x, value, 1, value, value))
        else:
            points.append(_Point(x, x, 0.0, 0, math.inf, -math.inf))
            self._mark(x)
        self._in_last = 1

    def discard(self, points: Iterable[tuple[float, float]]) -> None:
        """Add values that a later session has trained again."""
        other = Curve()
        for x, value in points:
            other.add(x, value)
        self._keep_discarded(other._points)

    def as_json(self) -> dict[str, Any]:
        """Return the curve for the page: ``x``, ``y`` (None for a gap), and ``lo`` and ``hi`` if values were combined."""
        points = self._points
        found: dict[str, Any] = {"x": [point.last for point in points], "y": [_mean(point) for point in points]}
        if self._size > 1:
            found["lo"] = [rounded(point.low) if point.count else None for point in points]
            found["hi"] = [rounded(point.high) if point.count else None for point in points]
        if self.nonfinite:
            found["bad"], found["badCount"] = self._marks, self.nonfinite
        if self._discarded:
            found["lost"] = [
                {"x": [point.last for point in part], "y": [_mean(point) for point in part]} for part in self._discarded
            ]
        return found

    @property
    def last(self) -> float | None:
        """The mean of the last finite values; None if there are none."""
        return next((_mean(point) for point in reversed(self._points) if point.count), None)

    def means(self) -> Iterator[tuple[float, float | None]]:
        """Yield the position and the mean of each point."""
        yield from ((point.last, _mean(point)) for point in self._points)

    def points(self) -> list[tuple[float, float]]:
        """Return the position and the mean of each point that has finite values."""
        return [(x, mean) for x, mean in self.means() if mean is not None]

    def extremes(self) -> tuple[float, float] | None:
        """Return the least and the greatest finite value."""
        finite = [point for point in self._points if point.count]
        if not finite:
            return None
        return min(point.low for point in finite), max(point.high for point in finite)

    def _mark(self, x: float) -> None:
        self.nonfinite += 1
        if len(self._marks) < _MOST_MARKS:
            self._marks.append(x)

    def _rewind(self, x: float) -> None:
        keep = len(self._points)
        while keep and self._points[keep - 1].last >= x:
            keep -= 1
        self._keep_discarded(self._points[keep:])
        del self._points[keep:]
        self._in_last = self._size

    def _keep_discarded(self, points: list[_Point]) -> None:
        if points and len(self._discarded) < _MOST_MARKS // 10:
            while len(points) > _MOST_MARKS:
                points = _combined(points)
            self._discarded.append(points)


def _combined(points: list[_Point]) -> list[_Point]:
    """Combine pairs of neighbors."""
    combined = points[::2]
    for first, second in zip(combined, points[1::2], strict=False):
        first.absorb(second)
    return combined


def _mean(point: _Point) -> float | None:
    return rounded(point.total / point.count) if point.count else None


def rounded(value: float) -> float:
    """Return a number with the digits that a picture can show."""
    return float(f"{value:.{_DIGITS}g}")
