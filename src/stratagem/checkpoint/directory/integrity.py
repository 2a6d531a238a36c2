"""Detect corrupted files by digests and strict JSON parsing; safetensors and torch's format do not detect bit flips."""

from __future__ import annotations

import json
from typing import Any, final

from blake3 import blake3

__all__ = ["ALGORITHM", "Digest", "digest_of", "parse_json"]

# A cryptographic hash that is faster than disks: https://github.com/BLAKE3-team/BLAKE3-specs.
ALGORITHM = "blake3"


@final
class Digest:
    """The digest of data that arrives in chunks."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next chunk of data."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the digest of all data so far as 64 hexadecimal digits."""
        return self._hash.hexdigest()


def digest_of(data: bytes) -> str:
    """Return the digest of ``data``."""
    return blake3(data).hexdigest()


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly.

    Raises:
        ValueError: if the data is not valid JSON, an object has a duplicate key, or the nesting is too deep.
    """
    try:
        return json.loads(data, object_pairs_hook=_as_dict, parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return entries


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")
