"""Make and parse unique temporary names that contain the process ID."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

__all__ = ["TemporaryName", "old_content_path", "temporary_path"]

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}", re.DOTALL)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TemporaryName:
    """A parsed temporary name.

    ``is_old_content`` is True for previously published contents that were moved away, and False for new contents that are not
    yet published.
    """

    target: Path
    pid: int
    is_old_content: bool

    @classmethod
    def parse(cls, path: Path) -> Self | None:
        """Parse the name of ``path``; return None if it is not a temporary name."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        return cls(target=path.with_name(match["name"]), pid=int(match["pid"]), is_old_content=match["kind"] == "old")


def temporary_path(target: Path) -> Path:
    """Return a new path next to ``target`` for incomplete contents: ``.<name>.tmp-<pid>-<random>``."""
    return _sibling(target, "tmp")


def old_content_path(target: Path) -> Path:
    """Return a new path next to ``target`` for its old contents: ``.<name>.old-<pid>-<random>``."""
    return _sibling(target, "old")


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")
