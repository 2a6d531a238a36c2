"""Distinguish URLs from paths, and make paths absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["is_url", "absolute"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path starts with a scheme, such as ``https://`` or ``torchvision://``."""
    return bool(_SCHEME.match(os.fspath(path)))


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path with ``~`` expanded; symbolic links are not resolved."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 -- Path.absolute() keeps '..'
