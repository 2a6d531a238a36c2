"""The zip file that ``torch.save`` writes, read record by record and held to what it claims.

It holds a pickle (``<name>/data.pkl``) and the memory of each tensor (``<name>/data/<key>``), uncompressed. Python's
zip reader would take a record's word for its place and size; here no two records may overlap and none may leave the
file, so what is read is never more than the file is long.
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

_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_CHUNK_BYTES = 4 << 20
# 20 million operations, the most that are read, and what they carry.
_LARGEST_PICKLE_BYTES = 512 << 20


@final
class TorchArchive:
    """A file of torch's zip form, open for reading; a context manager.

    Raises:
        CheckpointDamagedError: if it is no whole file of this form.
        CheckpointError: if it is a whole file of a kind that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self._file: BufferedReader = path.open("rb")
        try:
            self.size = path.stat().st_size
            self._records = _directory(self._file, self.size)
            # torch can be told to write no checksums: then all of them are 0.
            self._has_checksums = any(info.CRC for info in self._records.values())
            self._prefix = self._find_prefix()
            self._check_byte_order()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def root(self) -> Any:
        """Return what the pickle says, with a record for every object; see :func:`read_pickle`."""
        info = self._record("data.pkl")
        if info.file_size > _LARGEST_PICKLE_BYTES:
            raise CheckpointError(
                f"beside its tensors it holds {info.file_size} bytes of objects; at most {_LARGEST_PICKLE_BYTES} are read. "
                "Save its weights alone where it was made."
            )
        return read_pickle(self._bytes(info))

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the memory of a tensor, ``length`` bytes, on the CPU."""
        info = self._record(f"data/{key}")
        if info.file_size != length:
            raise CheckpointDamagedError(f"its tensor memory {key!r} has {info.file_size} bytes, but {length} are due.")
        memory = torch.empty(length, dtype=torch.uint8)
        self._read(info, memory.numpy().data)
        return memory.untyped_storage()

    def check(self) -> None:
        """Compare every record with its checksum.

        Raises:
            CheckpointDamagedError: if one differs; it names the record.
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
        """Fill ``view`` with a record by pieces, or only its beginning again and again, and compare the checksum.

        Torch itself does not compare them.
        """
        self._file.seek(_data_offset(self._file, info))
        checksum = 0
        for start in range(0, info.file_size, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, info.file_size - start)
            piece = view[start : start + count] if keep else view[:count]
            if self._file.readinto(piece) != count:
                raise CheckpointDamagedError(f"it ends inside of {info.filename}.")
            checksum = zlib.crc32(piece, checksum)
        if self._has_checksums and checksum != info.CRC:
            raise CheckpointDamagedError(f"{info.filename} in it is not what was written: its checksum differs.")

    def _record(self, name: str) -> zipfile.ZipInfo:
        info = self._records.get(f"{self._prefix}/{name}")
        if info is None:
            raise CheckpointDamagedError(f"it has no record {self._prefix}/{name}.")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise CheckpointDamagedError(
                f"its record {info.filename} is compressed or encrypted, which torch never writes."
            )
        return info

    def _find_prefix(self) -> str:
        found = [name.removesuffix("/data.pkl") for name in self._records if name.endswith("/data.pkl")]
        found = [prefix for prefix in found if "/" not in prefix]
        if len(found) != 1:
            # What else torch writes tells its own file, in which a name was damaged, from any other zip file.
            if any(name.endswith(("/version", "/byteorder", "/serialization_id")) for name in self._records):
                raise CheckpointDamagedError("its zip directory does not name data.pkl once.")
            raise CheckpointError("it is a zip file, but not one that torch.save wrote: it has no single data.pkl.")
        if f"{found[0]}/constants.pkl" in self._records:
            raise CheckpointError(
                "it is a TorchScript program, not a checkpoint. Where you trust it: "
                "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
            )
        return found[0]

    def _check_byte_order(self) -> None:
        if f"{self._prefix}/byteorder" not in self._records:
            return
        order = self._bytes(self._record("byteorder")).decode("ascii", "replace")
        if order != sys.byteorder:
            raise CheckpointError(f"its numbers are {order}-endian, and this machine's are {sys.byteorder}-endian.")


def _directory(file: BufferedReader, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records by name, after checking that they lie side by side."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointDamagedError(f"its zip directory cannot be read: {error}.") from error
    places = sorted((info.header_offset, info.header_offset + _HEADER.size + info.compress_size) for info in infos)
    overlaps = any(stop > start for (_, stop), (start, _) in pairwise(places))
    if overlaps or (places and not 0 <= places[0][0] <= places[-1][1] <= min(end, size)):
        raise CheckpointDamagedError("records of its zip directory overlap or lie outside of the file.")
    records = {info.filename: info for info in infos}
    if len(records) != len(infos):
        raise CheckpointDamagedError("its zip directory names a record twice.")
    return records


def _data_offset(file: BufferedReader, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise CheckpointDamagedError(f"it ends before {info.filename}.")
    signature, name_length, extra_length = _HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise CheckpointDamagedError(f"there is no record where {info.filename} is due.")
    return info.header_offset + _HEADER.size + int(name_length) + int(extra_length)
