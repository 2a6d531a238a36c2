"""Find the largest micro-batch that fits into memory."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_that_fits"]

# A larger micro-batch is no longer useful, and its sizes would overflow.
_MOST = 2**20


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
        if low >= _MOST:
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
        return min(otherwise, _MOST)
    each = (peaks[low] - peaks[below]) / (low - below)
    return min(max(low + 1, low + int((limit - peaks[low]) / each) + 1), _MOST)
