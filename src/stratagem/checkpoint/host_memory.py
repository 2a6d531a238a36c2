"""Allocate CPU memory that an accelerator can copy to asynchronously."""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress
from typing import Final

import numpy as np
import torch
from torch import Tensor

__all__ = ["allocate_host_memory"]

logger = logging.getLogger(__name__)

# Registered memory can be used by all devices of the process.
_PORTABLE: Final = 1


def allocate_host_memory(nbytes: int, accelerator: str | None) -> Tensor:
    """Return a tensor of ``nbytes`` bytes in CPU memory, which is freed when it is no longer referenced.

    For CUDA, the memory is allocated with its exact size and page-locked. torch's allocator of pinned memory would round the
    size up to a power of two and keep the memory until the process exits.

    Args:
        nbytes: the size.
        accelerator: the type of the device whose tensors are copied to the memory; None for the CPU.
    """
    if accelerator == "cuda" and nbytes:
        return _registered(nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=accelerator is not None and nbytes > 0)


def _registered(nbytes: int) -> Tensor:
    array = _map(nbytes)
    address = array.ctypes.data
    error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if error:
        logger.warning(
            "%.1f GiB for copies of the state could not be page-locked (CUDA error %d), so saving in the background stops "
            "training longer. Check the memory limit of the process or container (ulimit -l).",
            nbytes / 2**30,
            error,
        )
        with suppress(RuntimeError):
            # CUDA reports the error once more, to the next kernel, which must not be one of the training.
            torch.ones(1, device="cuda")
    else:
        # All tensors and views of the memory refer to this array.
        weakref.finalize(array, _unregister, address).atexit = False
    return torch.from_numpy(array)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _map(nbytes: int) -> np.ndarray:
    """Return memory that is not inherited by data workers, since forking a process would copy page-locked memory."""
    if not hasattr(mmap, "MADV_DONTFORK"):
        return np.empty(nbytes, dtype=np.uint8)
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(mapped, dtype=np.uint8)
