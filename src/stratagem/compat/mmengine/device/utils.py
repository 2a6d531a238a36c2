"""Which devices are available, and how much memory they have used."""

from __future__ import annotations

from typing import Any

import torch

from stratagem.distributed import current_device

__all__ = [
    "get_device",
    "get_max_cuda_memory",
    "get_max_musa_memory",
    "is_cuda_available",
    "is_dipu_available",
    "is_mlu_available",
    "is_mps_available",
    "is_musa_available",
    "is_npu_available",
    "is_npu_support_full_precision",
]

_MIB = 2**20
# The first version of the Ascend processors that computes in full precision.
_FULL_PRECISION_NPU = 220


def get_device() -> str:
    """Return the type of the accelerator that torch supports, such as ``"cuda"``, or ``"cpu"``."""
    return current_device().type


def get_max_cuda_memory(device: torch.device | None = None) -> int:
    """Return the largest memory that tensors have used on a CUDA device since the last call, in MiB."""
    used = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return used // _MIB


def get_max_musa_memory(device: torch.device | None = None) -> int:
    """Return the largest memory that tensors have used on a MUSA device, in MiB."""
    return int(_backend("musa").max_memory_allocated(device)) // _MIB


def is_cuda_available() -> bool:
    """Return whether there is a CUDA device."""
    return torch.cuda.is_available()


def is_npu_available() -> bool:
    """Return whether there is an Ascend device."""
    return _is_available("npu")


def is_mlu_available() -> bool:
    """Return whether there is a Cambricon device."""
    return _is_available("mlu")


def is_mps_available() -> bool:
    """Return whether there is a device of Apple's Metal."""
    return torch.backends.mps.is_available()


def is_dipu_available() -> bool:
    """Return whether there is a DIPU device."""
    return _is_available("dipu")


def is_musa_available() -> bool:
    """Return whether there is a Moore Threads device."""
    return _is_available("musa")


def is_npu_support_full_precision() -> bool:
    """Return whether there is an Ascend device that computes in full precision."""
    return is_npu_available() and int(_backend("npu").utils.get_soc_version()) >= _FULL_PRECISION_NPU


def _is_available(name: str) -> bool:
    # The backends of these devices are packages that torch imports by itself, and that add such an attribute.
    backend = _backend(name)
    return backend is not None and bool(backend.is_available())


def _backend(name: str) -> Any:
    return getattr(torch, name, None)
