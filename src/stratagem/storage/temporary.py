"""Names of temporary siblings: recognisable, unique, and telling which process made them."""

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
    """What the name of a temporary sibling says.

    ``set_aside`` tells content that was published before, moved away to make room, from new content that was not
    published yet.
    """

    target: Path
    pid: int
    set_aside: bool

    @classmethod
    def parse(cls, path: Path) -> Self | None:
        """Return what the name of ``path`` says, or None if it is not the name of a temporary sibling."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        return cls(target=path.with_name(match["name"]), pid=int(match["pid"]), set_aside=match["kind"] == "old")


def temporary_path(target: Path) -> Path:
    """Return a new name beside ``target`` for content that is not complete yet: ``.<name>.tmp-<pid>-<random>``."""
    return _sibling(target, "tmp")


def old_content_path(target: Path) -> Path:
    """Return a new name beside ``target`` for its old content: ``.<name>.old-<pid>-<random>``."""
    return _sibling(target, "old")


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")
