"""Digests of what is written: neither safetensors nor torch's own form notices a flipped bit."""

from __future__ import annotations

from typing import final

from blake3 import blake3

__all__ = ["ALGORITHM", "Digest", "digest_of"]

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
