"""The record that makes published files visible: their names, sizes and digests.

A *generation* is one publication of a name: a folder ``<name>.g-<stamp>-<tag>`` that no other publication writes to. Its
record is written last and contains its own digest, so that an incomplete record is not recognized.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

__all__ = ["RECORD", "Generation", "PublicationRecord", "StoredFile"]

RECORD = "published.json"
_FORMAT = "stratagem-published"
_VERSION = 1
_GENERATION = re.compile(r"(?P<name>.+)\.g-(?P<stamp>[0-9a-f]{16})-(?P<tag>[0-9a-f]{8})")
# A path component that stays inside the folder on every system.
_PART = re.compile(r"[^./\\:\x00][^/\\:\x00]*")


@final
@dataclass(frozen=True, slots=True, order=True)
class Generation:
    """One publication of a name; a later one compares as greater."""

    name: str
    stamp: int
    tag: str

    @classmethod
    def after(cls, name: str, older: Iterable[Generation]) -> Self:
        """Return a new generation that is later than all of ``older``, regardless of their names and the clock."""
        newest = max((generation.stamp for generation in older), default=0)
        return cls(name, max(time.time_ns(), newest + 1), secrets.token_hex(4))

    @classmethod
    def parse(cls, folder: str) -> Self | None:
        """Parse a folder name; return None if it does not name a generation."""
        match = _GENERATION.fullmatch(folder)
        return cls(match["name"], int(match["stamp"], 16), match["tag"]) if match else None

    @property
    def folder_name(self) -> str:
        """The name of the folder."""
        return f"{self.name}.g-{self.stamp:016x}-{self.tag}"


@final
@dataclass(frozen=True, slots=True)
class StoredFile:
    """The size of a file in bytes and its SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PublicationRecord:
    """The published files: those in a folder, keyed by relative path, or a single file.

    ``metadata`` holds the publisher's plain JSON values; it may be empty.
    """

    files: Mapping[str, StoredFile]
    is_folder: bool
    published_at: float
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The total size of all files in bytes."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        """Return the record as a line of JSON followed by a line with its digest."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": "folder" if self.is_folder else "file",
            "published_at": self.published_at,
            "files": {path: {"bytes": file.size, "sha256": file.sha256} for path, file in self.files.items()},
            **({"about": dict(self.metadata)} if self.metadata else {}),
        }
        line = json.dumps(content, allow_nan=False).encode()
        return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Parse the result of :meth:`encode`; return None for anything else, such as an incomplete record."""
        line, _, digest = data.partition(b"\n")
        if digest != hashlib.sha256(line).hexdigest().encode() + b"\n":
            return None
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return cls._from_content(content) if isinstance(content, dict) and content.get("format") == _FORMAT else None

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> Self | None:
        entries, at, kind = content.get("files"), content.get("published_at"), content.get("kind")
        if content.get("version") != _VERSION or kind not in {"folder", "file"} or not isinstance(entries, dict):
            return None
        if not isinstance(at, float) or not math.isfinite(at) or not all(map(_is_safe_path, entries)):
            return None
        files = {path: _stored(entry) for path, entry in entries.items()}
        if any(file is None for file in files.values()) or (kind == "file" and len(files) != 1):
            return None
        found = {path: file for path, file in files.items() if file is not None}
        metadata = content.get("about")
        return cls(
            files=found,
            is_folder=kind == "folder",
            published_at=at,
            metadata=metadata if isinstance(metadata, dict) else {},
        )


def _stored(entry: Any) -> StoredFile | None:
    size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        return None
    return StoredFile(size, digest)


def _is_safe_path(path: str) -> bool:
    return path != RECORD and all(_PART.fullmatch(part) for part in path.split("/"))
