"""Amounts of memory, bandwidths and durations."""

from __future__ import annotations

import pytest

from stratagem.errors import ConfigValueError
from stratagem.hardware import format_bytes, format_operations, format_seconds, parse_bytes, parse_duration, parse_rate


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("640kB", 640_000), ("512B", 512)],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    """GiB is 2^30 bytes, and GB 10^9."""
    assert parse_bytes(text, option="--memory") == count


@pytest.mark.parametrize("text", ["80", "80G", "80Gb", "-1GiB", "0GiB", "eighty", "80GiB/s", ""])
def test_ambiguous_amounts_are_refused(text: str) -> None:
    """80G could be either, so the message asks for GiB or GB."""
    with pytest.raises(ConfigValueError, match=r"--memory .* Write a positive number with a unit: 80GiB"):
        parse_bytes(text, option="--memory")


def test_bandwidths_in_bytes_and_bits() -> None:
    """A byte has 8 bits."""
    assert parse_rate("25GB/s") == 25e9
    assert parse_rate("200Gb/s") == 25e9
    with pytest.raises(ConfigValueError, match="--storage '2GB' is not a bandwidth"):
        parse_rate("2GB", option="--storage")


def test_durations() -> None:
    """Seconds, minutes, hours and days."""
    assert [parse_duration(text, option="--mtbf") for text in ("90s", "15min", "2h", "1d")] == [90, 900, 7200, 86400]
    with pytest.raises(ConfigValueError, match="--mtbf '50000' is not a duration"):
        parse_duration("50000", option="--mtbf")


def test_printed_amounts_have_three_digits() -> None:
    """Each number is printed with three significant digits, and never as 1,000 of a smaller unit."""
    assert [format_bytes(count) for count in (0, 1023, 1536, 79.125 * 2**30, 1023.9 * 2**20)] == [
        "0 B", "1023 B", "1.50 KiB", "79.1 GiB", "1.00 GiB",
    ]  # fmt: skip
    assert [format_seconds(each) for each in (0, 3.4e-6, 0.0125, 59.0, 90.0, 7200, 100_000)] == [
        "0 s", "3.40 µs", "12.5 ms", "59.0 s", "90.0 s", "2.00 h", "27.8 h",
    ]  # fmt: skip


def test_operations_have_a_decimal_unit() -> None:
    """8e14 operations are 800 TFLOP."""
    assert [format_operations(each) for each in (0, 12, 1500, 8e14, 2.5e22)] == [
        "0.00 FLOP", "12.0 FLOP", "1.50 kFLOP", "800 TFLOP", "25,000 EFLOP",
    ]  # fmt: skip
