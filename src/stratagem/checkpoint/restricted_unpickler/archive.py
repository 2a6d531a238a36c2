"""Read and check the zip archives that ``torch.save`` writes.

An archive contains a pickle (``<name>/data.pkl``) and the storage of each tensor (``<name>/data/<key>``), uncompressed.
Python's zip reader trusts the recorded offsets and sizes. This module additionally requires that records neither
overlap nor extend beyond the file, so that a small file cannot cause large reads.
"""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch

from stratagem.checkpoint.restricted_unpickler.pickle_vm import read_pickle
from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = ["TorchArchive"]

_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_CHUNK_BYTES = 4 << 20
# Enough for 20 million operations, the limit of the pickle reader, with their arguments.
_MAX_PICKLE_BYTES = 512 << 20


@final
class TorchArchive:
    """A zip archive written by ``torch.save``, open for reading; a context manager.

    Raises:
        CheckpointDamagedError: if the file is not a complete archive.
        CheckpointError: if the type of the archive is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._file: BufferedReader = path.open("rb")
        try:
            self.size = path.stat().st_size
            self._records = _read_directory(self._file, self.size)
            # If torch is configured not to write checksums, all checksums are 0.
            self._has_checksums = any(info.CRC for info in self._records.values())
            self._prefix = self._find_prefix()
            self._check_byte_order()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def root(self) -> Any:
        """Read the pickle, with a placeholder for each object; see :func:`read_pickle`."""
        info = self._record("data.pkl")
        if info.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"it contains {info.file_size} bytes of pickled objects; at most {_MAX_PICKLE_BYTES} bytes are read. "
                "Save only the weights in the environment where the file was written."
            )
        return read_pickle(self._bytes(info))

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the tensor storage ``key``, which has ``length`` bytes, on the CPU."""
        info = self._record(f"data/{key}")
        if info.file_size != length:
            raise CheckpointDamagedError(f"its tensor storage {key!r} has {info.file_size} bytes; expected {length}.")
        memory = torch.empty(length, dtype=torch.uint8)
        self._read(info, memory.numpy().data)
        return memory.untyped_storage()

    def check(self) -> None:
        """Compare every record with its checksum.

        Raises:
            CheckpointDamagedError: if a checksum differs; the message names the record.
        """
        buffer = bytearray(_CHUNK_BYTES)
        for info in self._records.values():
            if not info.is_dir():
                self._read(info, memoryview(buffer), keep=False)

    def _bytes(self, info: zipfile.ZipInfo) -> bytes:
        data = bytearray(info.file_size)
        self._read(info, memoryview(data))
        return bytes(data)

    def _read(self, info: zipfile.ZipInfo, view: memoryview, *, keep: bool = True) -> None:
        """Read a record into ``view`` and compare its checksum, which torch does not do.

        If ``keep`` is False, ``view`` is a buffer that is overwritten by each chunk.
        """
        self._file.seek(_data_offset(self._file, info))
        checksum = 0
        for start in range(0, info.file_size, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, info.file_size - start)
            piece = view[start : start + count] if keep else view[:count]
            if self._file.readinto(piece) != count:
                raise CheckpointDamagedError(f"it ends in the middle of {info.filename}.")
            checksum = zlib.crc32(piece, checksum)
        if self._has_checksums and checksum != info.CRC:
            raise CheckpointDamagedError(f"its record {info.filename} is corrupted: the checksum does not match.")

    def _record(self, name: str) -> zipfile.ZipInfo:
        info = self._records.get(f"{self._prefix}/{name}")
        if info is None:
            raise CheckpointDamagedError(f"it does not contain the record {self._prefix}/{name}.")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise CheckpointDamagedError(
                f"its record {info.filename} is compressed or encrypted, but torch never compresses or encrypts "
                "records."
            )
        return info

    def _find_prefix(self) -> str:
        found = [name.removesuffix("/data.pkl") for name in self._records if name.endswith("/data.pkl")]
        found = [prefix for prefix in found if "/" not in prefix]
        if len(found) != 1:
            # If a name is corrupted, other records still show whether this is a torch file or a different kind of zip
            # file.
            if any(name.endswith(("/version", "/byteorder", "/serialization_id")) for name in self._records):
                raise CheckpointDamagedError("its zip directory does not contain exactly one data.pkl.")
            raise CheckpointError(
                "it is a zip file that was not written by torch.save: it does not contain exactly one data.pkl."
            )
        if f"{found[0]}/constants.pkl" in self._records:
            raise CheckpointError(
                "it is a TorchScript program, not a checkpoint. If you trust it, convert it with "
                "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
            )
        return found[0]

    def _check_byte_order(self) -> None:
        if f"{self._prefix}/byteorder" not in self._records:
            return
        order = self._bytes(self._record("byteorder")).decode("ascii", "replace")
        if order != sys.byteorder:
            raise CheckpointError(f"its tensors are {order}-endian, but this machine is {sys.byteorder}-endian.")


def _read_directory(file: BufferedReader, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records by name, after checking that they do not overlap."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointDamagedError(f"its zip directory cannot be read: {error}.") from error
    ranges = sorted((info.header_offset, info.header_offset + _HEADER.size + info.compress_size) for info in infos)
    overlaps = any(stop > start for (_, stop), (start, _) in pairwise(ranges))
    if overlaps or (ranges and not 0 <= ranges[0][0] <= ranges[-1][1] <= min(end, size)):
        raise CheckpointDamagedError("records in its zip directory overlap or extend beyond the file.")
    records = {info.filename: info for info in infos}
    if len(records) != len(infos):
        raise CheckpointDamagedError("its zip directory contains a duplicate name.")
    return records


def _data_offset(file: BufferedReader, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise CheckpointDamagedError(f"it ends before {info.filename}.")
    signature, name_length, extra_length = _HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise CheckpointDamagedError(f"there is no record at the offset of {info.filename}.")
    return info.header_offset + _HEADER.size + int(name_length) + int(extra_length)
