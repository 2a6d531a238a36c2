"""Distinguish URLs from paths, and make paths absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["absolute", "is_url", "path_fault"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path starts with a scheme, such as ``https://`` or ``torchvision://``."""
    return bool(_SCHEME.match(os.fspath(path)))


def path_fault(path: str | os.PathLike[str]) -> str | None:
    """Return why files with this path cannot be read by every part of a run, or None if there is no reason.

    Libraries that are written in other languages, such as safetensors, only accept paths in UTF-8.
    """
    text = os.fspath(path)
    if "\0" in text:
        return f"{text!r} contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{os.fsencode(text)!r} is not UTF-8 at byte {len(os.fsencode(text[: error.start]))}"
    return None


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path with ``~`` expanded; symbolic links are not resolved."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 -- Path.absolute() keeps '..'
