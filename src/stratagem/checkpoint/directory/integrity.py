"""Digests of what is written: neither safetensors nor torch's own form notices a flipped bit."""

from __future__ import annotations

import json
from typing import Any, final

from blake3 import blake3

__all__ = ["ALGORITHM", "Digest", "digest_of", "parse_json"]

# Cryptographic, and faster than the disks that it checks: https://github.com/BLAKE3-team/BLAKE3-specs.
ALGORITHM = "blake3"


@final
class Digest:
    """The digest of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the digest of all that was taken in: 64 hexadecimal digits."""
        return self._hash.hexdigest()


def digest_of(data: bytes) -> str:
    """Return the digest of the bytes."""
    return blake3(data).hexdigest()


def parse_json(data: bytes) -> Any:
    """Return what the JSON says.

    Raises:
        ValueError: if it is none, an object has a name twice, or it is nested too deeply to be read.
    """
    try:
        return json.loads(data, object_pairs_hook=_as_dict, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an object has a name twice")
    return entries


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
