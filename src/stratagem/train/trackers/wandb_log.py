"""Read and write the files in which W&B stores runs: logs in the format of LevelDB.

After a header, the file consists of blocks of 32 KiB. A record that does not fit into a block is divided into chunks. Each
chunk has a checksum, its length and a kind: the whole record, or its first, a middle or its last chunk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, final

from stratagem.errors import StateError

__all__ = ["TransactionLogWriter", "read_transaction_log"]

_FILE_HEADER: Final = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_CHUNK_HEADER: Final = struct.Struct("<IHB")
_BLOCK_BYTES: Final = 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = range(1, 5)


def read_transaction_log(path: Path) -> Iterator[bytes]:
    """Yield the records of a file, up to an incomplete one that a killed process left.

    Raises:
        StateError: if the format of the file is unknown.
    """
    data = path.read_bytes()
    if not data.startswith(_FILE_HEADER):
        raise StateError(f"{path} has an unknown format: it starts with {data[: len(_FILE_HEADER)]!r}.")
    position, record = len(_FILE_HEADER), b""
    while position + _CHUNK_HEADER.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _CHUNK_HEADER.size:
            position += left
            continue
        checksum, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size
        chunk = data[position : position + length]
        position += length
        if len(chunk) < length or checksum != _checksum(kind, chunk):
            return
        record = chunk if kind in (_WHOLE, _FIRST) else record + chunk
        if kind in (_WHOLE, _LAST):
            yield record


@final
class TransactionLogWriter:
    """Writes records to a new file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(_FILE_HEADER)
        self._position = len(_FILE_HEADER)

    def write(self, record: bytes) -> None:
        """Write one record."""
        begin = True
        while True:
            left = _BLOCK_BYTES - self._position % _BLOCK_BYTES
            if left < _CHUNK_HEADER.size:
                self._append(bytes(left))
                continue
            chunk = record[: left - _CHUNK_HEADER.size]
            record = record[len(chunk) :]
            kind = (_FIRST if record else _WHOLE) if begin else (_MIDDLE if record else _LAST)
            self._append(_CHUNK_HEADER.pack(_checksum(kind, chunk), len(chunk), kind) + chunk)
            if not record:
                return
            begin = False

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)


def _checksum(kind: int, chunk: bytes) -> int:
    return zlib.crc32(chunk, zlib.crc32(bytes([kind])))
