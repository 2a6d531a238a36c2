"""Compare version strings."""

from __future__ import annotations

import re

from stratagem.errors import ConfigValueError

__all__ = ["digit_version"]

_PHASES = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "rc": -1, "c": -1, "post": 1}
_VERSION = re.compile(
    r"v?(?P<release>\d+(?:\.\d+)*)(?:[._-]?(?P<phase>dev|alpha|beta|rc|post|a|b|c)[._-]?(?P<number>\d*))?",
    re.IGNORECASE,
)


def digit_version(version: str, length: int = 4) -> tuple[int, ...]:
    """Return a tuple that sorts like the version: ``length`` release numbers, then the pre- or post-release phase and its number.

    Local version labels (``+cpu``) are ignored: ``digit_version("2.13.0+cpu") == digit_version("2.13")``.

    Raises:
        ConfigValueError: if the string does not start with a version.
    """
    match = _VERSION.match(version.strip())
    if match is None:
        raise ConfigValueError(f"{version!r} is not a version; expected something like '2.13.0' or '1.0rc1'.")
    release = [int(part) for part in match["release"].split(".")][:length]
    release += [0] * (length - len(release))
    phase = _PHASES[match["phase"].lower()] if match["phase"] else 0
    return (*release, phase, int(match["number"] or 0))
