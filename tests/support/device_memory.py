"""Count the memory that is allocated on a device, without such a device: torch's meta device stands in for it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["META", "DeviceMemory", "pretend_accelerator"]

META: Final = torch.device("meta")


class DeviceMemory(TorchDispatchMode):
    """Counts the bytes of the storages on a device that operations allocate inside the ``with`` block.

    Attributes:
        held: the bytes that are allocated now and still in use.
        peak: the largest number of bytes that were allocated at the same time.
        sizes: the size of each allocation.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.held = 0
        self.peak = 0
        self.sizes: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and each.device.type == self.device.type:
                self._known.add(each.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type == self.device.type:
                self._count(each)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.sizes.append(size)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._free, storage._cdata, size)

    def _free(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.held -= size


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report one accelerator: the meta device, whose random numbers have an empty state."""
    module = SimpleNamespace(get_rng_state=lambda _: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: META)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
