"""Versions of packages and of the working directory."""

from __future__ import annotations

import subprocess

from packaging.version import InvalidVersion, parse

from stratagem.compat.mmengine.checks import InvalidArgumentError
from stratagem.errors import ConfigTypeError

__all__ = ["digit_version", "get_git_hash"]

# The order of versions with the same release: alpha < beta < candidate < the release < post-release.
_PHASES = {"a": -3, "b": -2, "rc": -1}
_DEVELOPMENT = -4


def digit_version(version_str: str, length: int = 4) -> tuple[int, ...]:
    """Return a tuple that sorts like the version: ``length`` release numbers, then the phase and its number.

    The phase is -4 for a development version, -3 for an alpha, -2 for a beta, -1 for a candidate, 0 for a release, and 1 for a
    post-release. Local labels such as ``+cpu`` are ignored.

    Raises:
        AssertionError: if the string is not a version.
    """
    try:
        version = parse(version_str)
    except InvalidVersion as error:
        raise InvalidArgumentError(f"{version_str!r} is not a version, such as '2.13.0' or '1.0rc1'.") from error
    release = (*version.release[:length], *(0,) * (length - len(version.release)))
    if version.pre is not None:
        return (*release, _PHASES[version.pre[0]], version.pre[1])
    if version.is_prerelease:
        return (*release, _DEVELOPMENT, 0)
    if version.post is not None:
        return (*release, 1, version.post)
    return (*release, 0, 0)


def get_git_hash(fallback: str = "unknown", digits: int | None = None) -> str:
    """Return the commit of the working directory.

    Args:
        fallback: what to return if Git is not installed.
        digits: how many characters of the hash to return; all by default.

    Raises:
        TypeError: if ``digits`` is not a number.
    """
    if digits is not None and not isinstance(digits, int):
        raise ConfigTypeError(f"digits must be None or an integer, got {digits!r}.")
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    except OSError:
        return fallback
    return done.stdout.strip()[:digits]
