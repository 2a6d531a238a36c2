"""Compute the byte offset of each tensor in a safetensors file before writing it.

The format is described at https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the
header, then the tensors, row-major and little-endian, without gaps. Because all offsets are known in advance, several ranks
can write their boxes to one file, and the result is the same as if a single process had written it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch

from stratagem.checkpoint.directory.integrity import parse_json
from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = ["DTYPES", "FileLayout", "TensorSpec"]

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
# The metadata that libraries expect in a file with torch tensors.
_METADATA = {"format": "pt"}
# The header is padded with spaces to a multiple of this, so that the tensors of a mapped file are aligned.
_ALIGNMENT = 64
# The maximum size in bytes of a header that the safetensors library reads.
_MAX_HEADER_BYTES = 100_000_000


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@final
@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of a safetensors file.

    Attributes:
        specs: a mapping from tensor names to dtypes and shapes.
        header: the bytes before the first tensor.
        starts: a mapping from tensor names to offsets in the file, in bytes.
        size: the size of the file in bytes.
    """

    specs: Mapping[str, TensorSpec]
    header: bytes
    starts: Mapping[str, int]
    size: int

    @classmethod
    def plan(cls, specs: Mapping[str, TensorSpec]) -> Self:
        """Lay out tensors in order of decreasing item size, so that each is aligned.

        Raises:
            CheckpointError: if the header would be larger than safetensors allows.
        """
        entries: dict[str, object] = {"__metadata__": _METADATA}
        offsets: dict[str, int] = {}
        end = 0
        for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
            spec = specs[name]
            offsets[name], end = end, end + spec.nbytes
            entries[name] = {
                "dtype": DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        if len(text) > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"The names of {len(specs)} tensors require a header of {len(text)} bytes, but safetensors supports at "
                f"most {_MAX_HEADER_BYTES} bytes. Save to a file name that ends in .pth."
            )
        header = len(text).to_bytes(8, "little") + text
        return cls(specs, header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end)

    @classmethod
    def read(cls, header: bytes, size: int) -> Self:
        """Read the layout of a file of ``size`` bytes from its first bytes: the length of the header and the header.

        Raises:
            CheckpointDamagedError: if the header is invalid or does not match the size.
        """
        try:
            if int.from_bytes(header[:8], "little") != len(header) - 8:
                raise ValueError("its recorded length is wrong")
            entries = parse_json(header[8:])
            entries.pop("__metadata__", None)
            specs = {name: _spec(entry) for name, entry in entries.items()}
            offsets = {name: _offsets(entry) for name, entry in entries.items()}
            _check_contiguous(specs, offsets, size - len(header))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointDamagedError(f"The header of the file cannot be read: {error}") from error
        return cls(specs, header, {name: len(header) + begin for name, (begin, _) in offsets.items()}, size)

    def chunks(self, name: str, runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Convert runs of a tensor's elements to (offset in the file, length), both in bytes."""
        itemsize, start = self.specs[name].dtype.itemsize, self.starts[name]
        return ((start + first * itemsize, count * itemsize) for first, count in runs)


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{ascii(entry['shape'])[:80]} is not a shape")
    return TensorSpec(_TYPES[entry["dtype"]], shape)


def _offsets(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"{ascii(entry['data_offsets'])[:80]} are not offsets")
    return begin, end


def _check_contiguous(specs: Mapping[str, TensorSpec], offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    """Check that the tensors are contiguous from the header to the end of the file."""
    reached = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if (begin, end) != (reached, reached + specs[name].nbytes):
            raise ValueError(f"the tensor {name!r} has invalid offsets {begin} to {end}")
        reached = end
    if reached != size:
        raise ValueError(
            f"its tensors should occupy {reached} bytes, but the file contains {size} bytes of tensor data"
        )
