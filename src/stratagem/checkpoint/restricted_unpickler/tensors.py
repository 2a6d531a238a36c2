"""Build tensors over storages from a file, after checking all sizes and offsets."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["DTYPES", "LAYOUTS", "sparse_tensor", "strided_tensor"]

_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
LAYOUTS: dict[str, torch.layout] = {str(layout): layout for layout in _LAYOUTS}

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)
# Torch's names for typed storages.
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES: dict[str, torch.dtype] = {
    **{str(dtype): dtype for dtype in _DTYPES},
    **{f"{package}.{name}": dtype for name, dtype in _STORAGE_DTYPES.items() for package in ("torch", "torch.cuda")},
    "torch.storage.UntypedStorage": torch.uint8,
}

_MAX_DIMS = 64
_MAX_BYTES = 1 << 62


def strided_tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any
) -> torch.Tensor:
    """Return a strided tensor over ``storage``; ``offset`` and ``stride`` count elements.

    Raises:
        ValueError: if the offset, size or stride is invalid or exceeds the storage.
    """
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_DIMS or not all(_is_count(number) for number in numbers):
        raise ValueError(f"invalid offset, size or stride of a tensor: {_format((offset, size, stride))}")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else -1
    if max(offset, last + 1) * dtype.itemsize > storage.nbytes():
        raise ValueError(
            f"a tensor with offset, size and stride {_format((offset, size, stride))} exceeds its storage of "
            f"{storage.nbytes()} bytes"
        )
    if math.prod(count for count in size if count) * dtype.itemsize > _MAX_BYTES:
        raise ValueError(f"the tensor size {_format(size)} is too large")
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, offset, tuple(size), tuple(stride))


def sparse_tensor(layout: torch.layout, data: Any) -> torch.Tensor:
    """Return a sparse tensor from its saved components, after checking its indices.

    Raises:
        ValueError: if the layout is not sparse.
        RuntimeError: if the indices do not match the size.
    """
    if layout is torch.sparse_coo:
        indices, values, size, *coalesced = data
        flag = bool(coalesced and coalesced[0])
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=True, is_coalesced=flag or None)
    if layout is torch.strided:
        raise ValueError("a sparse tensor has a strided layout")
    compressed, plain, values, size = data
    return torch.sparse_compressed_tensor(compressed, plain, values, size, layout=layout, check_invariants=True)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _MAX_BYTES


def _format(numbers: Any) -> str:
    text = ascii([type(number).__name__ if _has_long_int(number) else number for number in numbers])
    return text if len(text) <= 200 else f"{text[:200]}..."


def _has_long_int(number: Any) -> bool:
    """Return whether a value is, or contains, an integer that is too long to print."""
    parts = number if isinstance(number, tuple | list) else (number,)
    return any(isinstance(part, int) and part.bit_length() > 1000 for part in parts)
