"""Allocate large CPU tensors in huge pages."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["empty_in_huge_pages"]

# NumPy uses the same threshold. A huge page has 2 MiB on most machines.
_MIN_BYTES: Final = 4 << 20


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized CPU tensor; if it is large, ask the system to use huge pages.

    The first access to each page of new memory interrupts the program, which takes longer than reading the page from a fast
    disk. On systems without huge pages for memory of programs, this is ``torch.empty``.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _MIN_BYTES:
        _advise(tensor.data_ptr(), nbytes)
    return tensor


def _advise(address: int, nbytes: int) -> None:
    madvise = _madvise()
    if madvise is None:
        return
    start, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    # This is only a hint, so ignore errors, for example of kernels that do not support it.
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))  # type: ignore[attr-defined,unused-ignore]  # Linux only


@cache
def _madvise() -> Any:
    """Return the C function ``madvise``; None if the system does not have it or its flag for huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
