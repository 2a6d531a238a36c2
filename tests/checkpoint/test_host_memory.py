"""The memory for asynchronous copies from an accelerator. CUDA's functions are replaced, since there is no GPU."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from stratagem.checkpoint import staging
from stratagem.checkpoint.host_memory import allocate_host_memory
from stratagem.checkpoint.staging import Staging

ODD = 3 * 2**20 + 64  # rounded up to a power of two, this would be 4 MiB


class Registrations:
    """Records which memory is page-locked, as CUDA's runtime would, and what torch's allocator pins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = 0
        self.sizes: list[int] = []
        self.held: dict[int, int] = {}
        self.pinned: list[int] = []
        runtime = SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self.held.pop)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        empty = torch.empty

        def recorded(size: int, *, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
            if pin_memory:
                self.pinned.append(size)
            return empty(size, dtype=dtype)

        monkeypatch.setattr(torch, "empty", recorded)

    def _register(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        self.sizes.append(size)
        if not self.error:
            self.held[address] = size
        return self.error


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> Registrations:
    """The recorded allocations."""
    return Registrations(monkeypatch)


def test_exactly_the_needed_memory_is_page_locked(registrations: Registrations) -> None:
    """The memory is registered with its exact size instead of using torch's allocator, which rounds up to a power of two."""
    memory = allocate_host_memory(ODD, "cuda")
    assert memory.numel() == ODD
    assert registrations.held == {memory.data_ptr(): ODD}
    assert registrations.pinned == []


@pytest.mark.slow
def test_page_locked_memory_is_freed(registrations: Registrations) -> None:
    """The memory is unregistered when the last reference to it is dropped, even if that is a view."""
    view = torch.from_numpy(allocate_host_memory(ODD, "cuda").numpy()[:8])
    assert list(registrations.held.values()) == [ODD]
    del view
    gc.collect()
    assert registrations.held == {}


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(
    registrations: Registrations, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the limit on page-locked memory is exceeded, a warning names the size and the limit, and saves are slower."""
    kernels: list[str] = []

    def fail(_: int, device: str) -> Tensor:
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", fail)
    registrations.error = 2
    assert allocate_host_memory(2**20, "cuda").numel() == 2**20
    assert registrations.held == {}
    assert "0.0 GiB for copies of the state could not be page-locked (CUDA error 2)" in caplog.text
    assert "ulimit -l" in caplog.text
    # The next kernel reports CUDA's error again.
    assert kernels == ["cuda"]


def test_other_devices(registrations: Registrations) -> None:
    """Other accelerators use torch's allocator of pinned memory, and the CPU uses ordinary memory."""
    allocate_host_memory(100, "xpu")
    allocate_host_memory(100, None)
    assert registrations.pinned == [100]
    assert registrations.sizes == []


def test_saves_reuse_and_release_page_locked_memory(
    registrations: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the same tensors reuse the memory; if more is needed, the old memory is freed first."""
    monkeypatch.setattr(staging, "_accelerator_of", lambda _: "cuda")
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    made = Staging()
    tensors = [torch.ones(1000), torch.ones(3, dtype=torch.int8)]
    for value in (1.0, 2.0):
        copies = made.copy([each.fill_(value) for each in tensors])
        assert [set(each.tolist()) for each in copies] == [{value}, {value}]
    # 4000 bytes and 3 bytes, each rounded up to a multiple of 64.
    assert registrations.sizes == [4032 + 64]
    del copies
    made.copy([torch.ones(5000)])
    assert registrations.sizes == [4032 + 64, 20032]
    assert list(registrations.held.values()) == [20032]
