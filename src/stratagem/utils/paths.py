"""What kind of place a path names."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["is_url", "absolute"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Tell whether a place is written with a scheme, such as ``https://`` or ``torchvision://``."""
    return bool(_SCHEME.match(os.fspath(place)))


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path with ``~`` expanded; links are kept as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 -- Path.absolute() keeps '..'
