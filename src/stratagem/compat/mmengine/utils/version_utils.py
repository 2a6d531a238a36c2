"""Versions of packages and of the working directory."""

from __future__ import annotations

import subprocess

from stratagem.compat.mmengine.checks import InvalidArgumentError
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils import digit_version as parse_version

__all__ = ["digit_version", "get_git_hash"]


def digit_version(version_str: str, length: int = 4) -> tuple[int, ...]:
    """Return a tuple that sorts like the version; see :func:`stratagem.utils.digit_version`.

    Raises:
        AssertionError: if the string is not a version.
    """
    try:
        return parse_version(version_str, length)
    except ConfigValueError as error:
        raise InvalidArgumentError(str(error)) from error


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
