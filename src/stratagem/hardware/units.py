"""Read and print amounts of memory, bandwidths and durations."""

from __future__ import annotations

import math
import re
from typing import Final

from stratagem.errors import ConfigValueError

__all__ = [
    "format_bytes",
    "format_operations",
    "format_seconds",
    "parse_bytes",
    "parse_duration",
    "parse_rate",
    "three_digits",
]

_NUMBER: Final = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)(?P<rest>.*?)\s*")
_BYTES: Final[dict[str, int]] = {
    "B": 1,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)},
    "kB": 1000,
}
_BITS: Final[dict[str, float]] = {f"{prefix}b": 1000**power / 8 for power, prefix in enumerate("KMGT", 1)}
_SECONDS: Final[dict[str, float]] = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str, *, option: str) -> int:
    """Return a number of bytes, such as ``80GiB`` (2^30) or ``80GB`` (10^9).

    Raises:
        ConfigValueError: if it has no unit, an ambiguous one such as G, or is not positive.
    """
    found = _NUMBER.fullmatch(text)
    factor = None if found is None or found["rest"] else _BYTES.get(found["unit"])
    if found is None or factor is None or float(found["number"]) * factor < 1:
        raise ConfigValueError(
            f"{option} {text!r} is not an amount of memory. Write a positive number with a unit: 80GiB (80 x 2^30 bytes) or 80GB "
            "(80 x 10^9 bytes)."
        )
    return round(float(found["number"]) * factor)


def parse_rate(text: str, *, option: str = "The bandwidth") -> float:
    """Return bytes per second, from bytes such as ``25GB/s`` or bits such as ``400Gb/s``.

    Raises:
        ConfigValueError: if it has a different form or is not positive.
    """
    found = _NUMBER.fullmatch(text)
    factor = None if found is None or found["rest"] != "/s" else {**_BYTES, **_BITS}.get(found["unit"])
    if found is None or factor is None or float(found["number"]) == 0:
        raise ConfigValueError(
            f"{option} {text!r} is not a bandwidth. Write a positive number with a unit: 25GB/s (bytes) or 400Gb/s (bits)."
        )
    return float(found["number"]) * factor


def parse_duration(text: str, *, option: str) -> float:
    """Return seconds, from a duration such as ``90s``, ``15min``, ``50000h`` or ``30d``.

    Raises:
        ConfigValueError: if it has a different form or is not positive.
    """
    found = _NUMBER.fullmatch(text)
    factor = None if found is None or found["rest"] else _SECONDS.get(found["unit"])
    if found is None or factor is None or float(found["number"]) == 0:
        raise ConfigValueError(
            f"{option} {text!r} is not a duration. Write a positive number with a unit: 90s, 15min, 50000h or 30d."
        )
    return float(found["number"]) * factor


def format_bytes(count: float) -> str:
    """Return a number of bytes with three significant digits and a binary unit, such as ``1.25 GiB``."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    power = min(5, int(math.log2(abs(count)) / 10))
    value = count / 1024**power
    if abs(value) >= 999.5 and power < 5:
        value, power = value / 1024, power + 1
    return f"{three_digits(value)} {' KMGTP'[power]}iB"


def format_seconds(seconds: float) -> str:
    """Return a duration in the largest unit in which it is at least 1, such as ``2.5 ms`` or ``3.1 h``."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        # Two days are easier to read in hours.
        if seconds >= length * (2 if unit in {"d", "min"} else 1):
            return f"{three_digits(seconds / length)} {unit}"
    return "0 s" if seconds == 0 else f"{three_digits(seconds / 1e-6)} µs"


def format_operations(count: float) -> str:
    """Return a number of floating-point operations with three significant digits and a decimal unit, such as ``800 TFLOP``."""
    power = 0 if count < 1000 else min(6, int(math.log10(count) / 3))
    return f"{three_digits(count / 1000**power)} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def three_digits(value: float) -> str:
    """Return a number with three significant digits, and all digits before the point."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
