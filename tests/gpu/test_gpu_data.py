"""Batches are copied to the GPU while it computes, without changing results and without a wait of the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from stratagem import Runner
from stratagem.data import AcceleratorCopyStream, copy_ahead
from stratagem.data.workers import _warn_of_fork
from stratagem.model import pin_tensors, to_device
from tests.gpu.models import SHAPES, Samples
from tests.gpu.runs import settings, trained
from tests.gpu.test_gpu_synchronization import INTERVAL, WARM_UP, RefuseSynchronization, set_mode

MEBIBYTE = 2**20
# About a second on a GPU with 1 to 2 GHz.
LONG_CYCLES = 1_500_000_000
SHORT_CYCLES = 20_000_000


@dataclass
class Pair:
    """A batch that torch's DataLoader does not pin."""

    inputs: Tensor
    targets: Tensor


def collate_pair(samples: list[Any]) -> Pair:
    """Return a batch as a dataclass."""
    return Pair(*default_collate(samples))


def data(**options: Any) -> dict[str, Any]:
    """Return the data of the small run with other options."""
    return {"train_dataloader": {"dataset": Samples(SHAPES["mlp"]), "batch_size": 8, **options}}


def large_batches(count: int, mebibytes: int) -> list[Tensor]:
    """Return batches in pinned memory, each filled with its number."""
    return [torch.full((mebibytes * MEBIBYTE // 4,), float(number)).pin_memory() for number in range(count)]


def stream_to(device: torch.device) -> AcceleratorCopyStream:
    """Return a stream that copies batches as the loops do."""
    return AcceleratorCopyStream(device, lambda host: to_device(pin_tensors(host), device, non_blocking=True))


def weights(folder: Path, iterations: int, **options: Any) -> dict[str, Tensor]:
    """Train the small run with options of its data; return the state of the model."""
    torch.manual_seed(7)  # for the initial weights
    return trained(folder, iterations=iterations, **data(**options))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_does_not_change_a_bit(workers: int, device: torch.device, tmp_path: Path) -> None:
    """The weights after three epochs equal those of a run that copies each batch in its iteration."""
    found, expected = (
        weights(tmp_path / str(ahead), 36, num_workers=workers, device_prefetch=ahead) for ahead in (True, False)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ahead", [True, False])
def test_the_host_does_not_wait_for_copies(ahead: bool, device: torch.device, tmp_path: Path) -> None:
    """Between log lines, nothing synchronizes with the GPU, with and without reading ahead."""
    refuse = RefuseSynchronization()
    changes = data(num_workers=2, persistent_workers=True, device_prefetch=ahead)
    runner = Runner(**settings(tmp_path, iterations=110, custom_hooks=[refuse], **changes))
    try:
        runner.train()
    finally:
        set_mode("default")
        runner.close()
    assert refuse.refused == 110 - WARM_UP
    assert INTERVAL < 110


def test_batches_of_any_type_are_copied_without_a_wait(cuda: torch.device) -> None:
    """The tensors of a dataclass, which the loader does not pin, are pinned and copied asynchronously."""
    samples = Samples(SHAPES["mlp"])
    loader = DataLoader(samples, batch_size=8, collate_fn=collate_pair, pin_memory=True)
    expected = list(DataLoader(samples, batch_size=8, collate_fn=collate_pair))
    set_mode("error")
    try:
        copies = [copied for _, copied in copy_ahead(iter(loader), stream_to(cuda))]
    finally:
        set_mode("default")
    assert all(copied.inputs.device == cuda for copied in copies)
    for copied, batch in zip(copies, expected, strict=True):
        assert torch.equal(copied.inputs.cpu(), batch.inputs)
        assert torch.equal(copied.targets.cpu(), batch.targets)


def test_the_copy_of_the_next_batch_overlaps_with_the_computation(cuda: torch.device) -> None:
    """The copy of the second batch is complete while the GPU still computes on the first one."""
    events = []
    stream = stream_to(cuda)

    class Recording:
        """Keeps the events of the copies."""

        wait = stream.wait

        def copy(self, host: Any) -> tuple[Any, Any]:
            copied, event = stream.copy(host)
            events.append(event)
            return copied, event

    torch.cuda.synchronize()
    batches = copy_ahead(iter(large_batches(2, 64)), Recording())
    next(batches)
    torch.cuda._sleep(LONG_CYCLES)
    computed = torch.cuda.Event()
    computed.record()
    events[1].synchronize()
    assert not computed.query()
    torch.cuda.synchronize()


def test_no_copy_overwrites_memory_that_is_still_read(cuda: torch.device) -> None:
    """Although the GPU is far behind the host, and batches are deleted right after use, each is read with its own values."""
    sums = []
    for _, copied in copy_ahead(iter(large_batches(12, 16)), stream_to(cuda)):
        torch.cuda._sleep(SHORT_CYCLES)
        sums.append(copied[:: MEBIBYTE // 4].double().mean())
        del copied
    assert [total.item() for total in sums] == list(range(12))


def test_the_copy_waits_for_reads_of_a_batch_that_the_model_keeps(cuda: torch.device) -> None:
    """A batch that is still read two iterations later, such as by a model that compares batches, keeps its values."""
    kept: list[Tensor] = []
    differences = []
    for _, copied in copy_ahead(iter(large_batches(12, 16)), stream_to(cuda)):
        kept.append(copied)
        if len(kept) > 2:
            torch.cuda._sleep(SHORT_CYCLES)
            differences.append((copied[:8] - kept.pop(0)[-8:]).mean())
    assert [each.item() for each in differences] == [2.0] * 10


def test_reading_ahead_uses_the_memory_of_three_batches(cuda: torch.device) -> None:
    """However far the host is ahead of the GPU, at most three batches are in GPU memory."""
    host = large_batches(10, 16)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _, copied in copy_ahead(iter(host), stream_to(cuda)):
        torch.cuda._sleep(SHORT_CYCLES)
        copied[:8].sum()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 3.1 * 16 * MEBIBYTE


def test_an_endless_loader_is_not_read_to_its_end(cuda: torch.device) -> None:
    """Only one batch more than requested is read."""
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(True)
            yield torch.ones(4)

    batches = copy_ahead(endless(), stream_to(cuda))
    assert [float(next(batches)[1].sum()) for _ in range(5)] == [4.0] * 5
    assert len(read) == 6


def test_forked_workers_are_reported_and_clean_ones_give_the_same_bits(cuda: torch.device, tmp_path: Path) -> None:
    """With the default start method, a run on a GPU warns once; with forkserver, it does not, and trains the same weights."""
    _warn_of_fork.cache_clear()
    found = {}
    for context in (None, "forkserver"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context}
            found[context] = weights(tmp_path / str(context), 24, **options)
        assert sum("data workers are forked" in str(each.message) for each in caught) == (context is None)
    assert all(torch.equal(found[None][name], value) for name, value in found["forkserver"].items())
