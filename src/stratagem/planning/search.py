"""Find the largest micro-batch that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["MOST_SAMPLES", "largest_of_profiles", "largest_that_fits"]

# A larger micro-batch is no longer useful, and its sizes would overflow.
MOST_SAMPLES = 2**20


def largest_of_profiles(totals: Callable[[int], Sequence[int]], limits: Sequence[int], start: int) -> list[int]:
    """Return the largest size that fits each limit, like ``largest_that_fits``, with few evaluations.

    All storages of a step grow linearly with the size in almost all models, so two steps determine every other one. A third
    step, of the largest result, checks that. A step of a single sample has fewer copies, because dimensions of size 1 need no
    other memory layout, so it determines nothing.

    Args:
        totals: returns the sums of all storages after each change during a step of a size.
        limits: amounts of memory in bytes.
        start: a size.
    """
    known: dict[int, Sequence[int]] = {}

    def profile(size: int) -> Sequence[int]:
        if size not in known:
            known[size] = totals(size)
        return known[size]

    if start == 1 and max(profile(1)) > max(limits):
        return [0] * len(limits)
    base = max(2, start)
    low, high = profile(base), profile(2 * base)
    if len(low) == len(high):
        slopes = [(after - before) / base for before, after in zip(low, high, strict=True)]
        results = [_largest_linear(low, slopes, base, limit) for limit in limits]
        checked = max(results)
        expected = max(before + (checked - base) * slope for before, slope in zip(low, slopes, strict=True))
        if checked < 2 or max(profile(checked)) == expected:
            return [
                result if result > 1 else int(max(profile(1)) <= limit)
                for result, limit in zip(results, limits, strict=True)
            ]
    return [largest_that_fits(lambda size: max(profile(size)), limit, start) for limit in limits]


def _largest_linear(low: Sequence[int], slopes: Sequence[float], start: int, limit: int) -> int:
    """Return the largest size for which no sum exceeds the limit; 0 if that of a single sample does."""
    result = float(MOST_SAMPLES)
    for before, slope in zip(low, slopes, strict=True):
        constant = before - start * slope
        if slope > 0:
            result = min(result, (limit - constant) // slope)
        elif constant + slope > limit:
            return 0
    return max(0, int(result))


def largest_that_fits(peak: Callable[[int], int], limit: int, start: int) -> int:
    """Return the largest size whose peak is at most ``limit``, or 0 if even a single sample does not fit.

    The peak grows almost linearly with the size, so each guess extrapolates from the two sizes that enclose the limit. The
    result is always checked: it fits, and one more does not.

    Args:
        peak: returns the peak memory of a size, which does not decrease with the size.
        limit: the memory in bytes.
        start: the size of the first guess.
    """
    peaks: dict[int, int] = {}

    def fits(size: int) -> bool:
        if size not in peaks:
            peaks[size] = peak(size)
        return peaks[size] <= limit

    if not fits(1):
        return 0
    low, guess = 1, max(2, start)
    while fits(guess):
        low = guess
        if low >= MOST_SAMPLES:
            return low
        guess = _extrapolated(peaks, limit, low, 2 * low)
    high = guess
    while high - low > 1:
        guess = low + int((high - low) * (limit - peaks[low]) / (peaks[high] - peaks[low]))
        guess = min(max(guess, low + 1), high - 1)
        # The guess itself usually fits, and its successor does not.
        low, high = (guess, high) if fits(guess) else (low, guess)
        if low == guess and high - low > 1 and not fits(low + 1):
            return low
        if low == guess and high - low > 1:
            low += 1
    return low


def _extrapolated(peaks: dict[int, int], limit: int, low: int, otherwise: int) -> int:
    """Return a size that probably does not fit, judging by the two largest sizes that do."""
    below = max((size for size in peaks if size < low), default=None)
    if below is None or peaks[low] <= peaks[below]:
        return min(otherwise, MOST_SAMPLES)
    each = (peaks[low] - peaks[below]) / (low - below)
    return min(max(low + 1, low + int((limit - peaks[low]) / each) + 1), MOST_SAMPLES)
