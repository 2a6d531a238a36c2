"""Where each tensor lies in a file of safetensors, known before the first byte is written.

The form is described at https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header,
the header, then the tensors, row-major and little-endian, without holes. Because every place is known beforehand, many
ranks can write their parts of the same tensors into one file, which is then what a single process would have written.
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
# What libraries look for in a file that was written from torch.
_NOTES = {"format": "pt"}
# The header is filled up with spaces to a multiple of this, so that tensors are aligned when the file is mapped.
_ALIGNMENT = 64
# In bytes; what the library itself refuses to read beyond.
_MOST_HEADER = 100_000_000


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The type and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@final
@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file of safetensors before it is written.

    Attributes:
        specs: the tensors, by name.
        header: the bytes before the first tensor.
        starts: the place in the file, in bytes, where each tensor begins.
        size: of the whole file, in bytes.
    """

    specs: Mapping[str, TensorSpec]
    header: bytes
    starts: Mapping[str, int]
    size: int

    @classmethod
    def plan(cls, specs: Mapping[str, TensorSpec]) -> Self:
        """Lay the tensors out: those of the widest numbers first, so that each is aligned to its numbers.

        Raises:
            CheckpointError: if their names need more room than a file of safetensors has for them.
        """
        entries: dict[str, object] = {"__metadata__": _NOTES}
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
        if len(text) > _MOST_HEADER:
            raise CheckpointError(
                f"The names of {len(specs)} tensors need a header of {len(text)} bytes, more than the {_MOST_HEADER} that "
                "readers of safetensors take. Save to a name that ends in .pth."
            )
        header = len(text).to_bytes(8, "little") + text
        return cls(specs, header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end)

    @classmethod
    def read(cls, header: bytes, size: int) -> Self:
        """Return the layout of a file of ``size`` bytes that begins with these, the header's length and the header.

        Raises:
            CheckpointDamagedError: if they are no header, or that of another file.
        """
        try:
            if int.from_bytes(header[:8], "little") != len(header) - 8:
                raise ValueError("it is not as long as it says")
            entries = parse_json(header[8:])
            entries.pop("__metadata__", None)
            specs = {name: _spec(entry) for name, entry in entries.items()}
            places = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
            _refuse_holes(specs, places, size - len(header))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointDamagedError(f"The header of the file cannot be read: {error}") from error
        return cls(specs, header, {name: len(header) + begin for name, (begin, _) in places.items()}, size)

    def chunks(self, name: str, runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Turn runs of a tensor's elements into (place in the file, length), both in bytes."""
        itemsize, start = self.specs[name].dtype.itemsize, self.starts[name]
        return ((start + first * itemsize, count * itemsize) for first, count in runs)


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{entry['shape']} is no shape")
    return TensorSpec(_TYPES[entry["dtype"]], shape)


def _refuse_holes(specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[int, ...]], size: int) -> None:
    """Refuse tensors that are not one behind the other, from the header to the end of the file."""
    reached = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if (begin, end) != (reached, reached + specs[name].nbytes):
            raise ValueError(f"the tensor {name!r} cannot lie in the bytes {begin} to {end}")
        reached = end
    if reached != size:
        raise ValueError(f"its tensors have {reached} bytes, the file has {size} for them")
