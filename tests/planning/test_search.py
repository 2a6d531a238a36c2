"""The search for the largest micro-batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stratagem.planning.search import largest_of_profiles, largest_that_fits


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 64), st.integers(0, 5000), st.integers(0, 30))
def test_the_result_fits_and_one_more_does_not(fixed: int, each: int, start: int, limit: int, jump: int) -> None:
    """For peaks that grow with the size, linearly or with a jump, the result is the largest size that fits."""

    def peak(size: int) -> int:
        return fixed + each * size + (100 if size > jump else 0)

    found = largest_that_fits(peak, limit, start)
    assert found == max((size for size in range(1, 5001) if peak(size) <= limit), default=0)


def test_a_linear_peak_needs_few_measurements() -> None:
    """Sizes are extrapolated instead of bisected."""
    sizes: list[int] = []

    def peak(size: int) -> int:
        sizes.append(size)
        return 1000 + 7 * size

    assert largest_that_fits(peak, 1_000_000, 8) == 142_714
    assert len(sizes) <= 8


def test_two_sizes_determine_the_largest_that_fits_all_limits() -> None:
    """The sums 50 + 3n and 10 + 7n reach 100 at n = 12 (94 and 86 at 12, 97 and 101 at 13), and one more size is checked."""
    sizes: list[int] = []

    def totals(size: int) -> list[int]:
        sizes.append(size)
        return [50 + 3 * size, 10 + 7 * size]

    assert largest_of_profiles(totals, [100, 60, 52], 2) == [12, 3, 0]
    assert sizes == [2, 4, 12, 1]


def test_a_single_sample_with_fewer_copies_determines_nothing() -> None:
    """One sample needs 5, without a copy; n samples need 4 + 2n and a copy of n, so 100 is enough for 32 samples."""
    sizes: list[int] = []

    def totals(size: int) -> list[int]:
        sizes.append(size)
        return [5] if size == 1 else [4 + 2 * size, 4 + 3 * size]

    assert largest_of_profiles(totals, [100, 9, 5, 4], 1) == [32, 1, 1, 0]
    assert sizes == [1, 2, 4, 32]


def test_sums_that_are_not_linear_are_searched() -> None:
    """A step whose memory grows with the square of the size fits 10 samples into 100, which a line through two sizes misses."""
    assert largest_of_profiles(lambda size: [size * size], [100, 99], 2) == [10, 9]
    assert largest_of_profiles(lambda size: [1] * size, [1], 2)[0] > 1000


def test_nothing_else_is_measured_if_a_single_sample_is_too_large() -> None:
    """If the batch has one sample, and it does not fit the largest limit, no other size is measured."""
    sizes: list[int] = []

    def totals(size: int) -> list[int]:
        sizes.append(size)
        return [10 * size, 100 * size]

    assert largest_of_profiles(totals, [50, 99], 1) == [0, 0]
    assert sizes == [1]
