"""Autocast with the default dtype of each device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stratagem.compat.mmengine.device import get_device

__all__ = ["autocast"]

_WITH_AUTOCAST = ("cuda", "cpu", "xpu", "npu", "mlu", "musa")


@contextmanager
def autocast(
    device_type: str | None = None,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Iterator[None]:
    """Return a context for ``torch.autocast`` on the current device.

    Args:
        device_type: the type of the device; by default that of the available accelerator, or the CPU.
        dtype: the dtype; by default bfloat16 on the CPU, and torch's default for other devices.
        enabled: whether autocast is enabled.
        cache_enabled: whether converted weights are cached; by default as in the surrounding context.

    Raises:
        AssertionError: if a dtype other than bfloat16 is requested on the CPU.
        RuntimeError: if the GPU does not support bfloat16.
        ValueError: if the device does not support autocast, and it is enabled.
    """
    kind = get_device() if device_type is None else device_type
    kind = kind.partition(":")[0]
    if kind not in _WITH_AUTOCAST:
        if enabled:
            raise ValueError(
                f"User specified autocast device_type={kind!r}, which is not supported; use cuda or cpu, or enabled=False."
            )
        yield
        return
    if kind == "cpu":
        dtype = torch.bfloat16 if dtype is None else dtype
        if dtype != torch.bfloat16:
            raise AssertionError(f"autocast on the CPU requires torch.bfloat16, got {dtype}.")
    elif dtype is None:
        dtype = torch.get_autocast_dtype(kind)
    if kind == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise RuntimeError("This GPU does not support bfloat16. Use dtype=torch.float16.")
    cache = torch.is_autocast_cache_enabled() if cache_enabled is None else cache_enabled
    with torch.autocast(device_type=kind, enabled=enabled, dtype=dtype, cache_enabled=cache):
        yield
