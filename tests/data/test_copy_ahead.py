"""Copying the next batch to the device: the order of the operations, errors, and which loaders are read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from stratagem.data import AcceleratorCopyStream, build_dataloader, copy_ahead
from stratagem.errors import ConfigTypeError, ConfigValueError
from tests.support.copy_streams import DelayedStream

CUDA = torch.device("cuda", 0)


def counted(calls: list[tuple[str, int]], count: int) -> Iterator[int]:
    """Yield numbers and record when each is requested."""
    for number in range(count):
        calls.append(("load", number))
        yield number


def test_the_next_copy_is_started_before_a_batch_is_yielded() -> None:
    """A batch is yielded after its copy was waited for and the copy of the next batch was started."""
    stream = DelayedStream()
    yielded = copy_ahead(counted(stream.calls, 3), stream)
    assert next(yielded) == (0, 0)
    begin = [("load", 0), ("copy", 0), ("wait", 0), ("load", 1), ("copy", 1)]
    assert stream.calls == begin
    assert next(yielded) == (1, 1)
    assert stream.calls == [*begin, ("wait", 1), ("load", 2), ("copy", 2)]
    assert list(yielded) == [(2, 2)]
    assert stream.calls[-1] == ("wait", 2)


def test_no_batches_are_yielded_for_an_empty_loader() -> None:
    """Without batches, nothing is copied."""
    stream = DelayedStream()
    assert list(copy_ahead(iter(()), stream)) == []
    assert stream.calls == []


def test_an_error_is_raised_when_its_batch_is_requested() -> None:
    """An error in the loading of the third batch is raised after two batches, although they were read ahead."""

    def failing() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("the sample is damaged")

    batches = copy_ahead(failing(), DelayedStream())
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)


def test_an_interrupt_is_raised_immediately() -> None:
    """Ctrl-C while the next batch is loaded is not postponed by an iteration."""

    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(copy_ahead(interrupted(), DelayedStream()))


def test_closing_closes_the_loader() -> None:
    """When reading ahead is closed early, the iterator of the loader is closed, which shuts down its workers."""
    closed = []

    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    ahead: Any = copy_ahead(batches(), DelayedStream())
    next(ahead)
    ahead.close()
    del ahead
    assert closed == [True]


class Queue:
    """Records the operations on a stream of a device."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Queue) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return "copied"

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")


def test_copies_run_on_a_side_stream_between_what_was_started_before_and_their_consumers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy waits for the current stream, since it may reuse memory that is read there; later, that stream waits for the copy.

    The host never waits.
    """
    log: list[str] = []
    devices = []

    def current_stream(device: torch.device) -> Queue:
        devices.append(device)
        return Queue("current", log)

    monkeypatch.setattr(torch, "Stream", lambda device: Queue("side", log))
    monkeypatch.setattr(torch.accelerator, "current_stream", current_stream)
    stream = AcceleratorCopyStream(CUDA, lambda host: log.append("copy") or f"{host} on device")
    copied, event = stream.copy("batch")
    assert copied == "batch on device"
    assert log == ["side waits for current", "on side", "copy", "off side", "side records"]
    stream.wait(event)
    assert log[5:] == ["current waits for copied"]
    assert devices == [CUDA, CUDA]


class Endless(IterableDataset[int]):
    """A stream without a state."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class Resumable(Endless):
    """A stream with a state."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


DATA = list(range(8))
READ_AHEAD: dict[str, tuple[Callable[[], Any], bool]] = {
    "workers": (lambda: {"dataset": DATA, "num_workers": 2}, True),
    "a dataset in the main process": (lambda: {"dataset": DATA}, False),
    "a dataset in the main process on request": (lambda: {"dataset": DATA, "device_prefetch": True}, True),
    "turned off": (lambda: {"dataset": DATA, "num_workers": 2, "device_prefetch": False}, False),
    "pageable memory": (lambda: {"dataset": DATA, "num_workers": 2, "pin_memory": False}, False),
    "a stream in workers": (lambda: {"dataset": Endless(), "num_workers": 2}, True),
    "a stream with a state": (lambda: {"dataset": Resumable()}, False),
    "a loader object": (lambda: DataLoader(DATA, num_workers=2), False),  # type: ignore[arg-type]
    "a pinned loader object": (lambda: DataLoader(DATA, num_workers=2, pin_memory=True), True),  # type: ignore[arg-type]
    "a custom order": (lambda: DataLoader(DATA, sampler=[3, 1], num_workers=2, pin_memory=True), True),  # type: ignore[arg-type]
    "a loader with a state": (lambda: StatefulDataLoader(DATA, num_workers=2, pin_memory=True), False),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.set_vital")
@pytest.mark.parametrize("kind", READ_AHEAD)
def test_loaders_are_read_ahead_if_that_changes_neither_samples_nor_positions(kind: str) -> None:
    """Loaders with workers and pinned memory are read ahead, unless their position is a state; on the CPU, none is."""
    make, expected = READ_AHEAD[kind]
    dataloader = make()
    loader = build_dataloader(dataloader, seed=0, training=True, device=CUDA)
    assert loader.reads_ahead is expected
    assert ("while the previous one is processed" in loader.describe_copies(CUDA)) is expected
    on_cpu = build_dataloader(dataloader, seed=0, training=True, device=torch.device("cpu"))
    assert (on_cpu.reads_ahead, on_cpu.describe_copies(torch.device("cpu"))) == (False, "")


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("xpu", True), ("cpu", False), ("mps", False)])
def test_memory_is_pinned_by_default_for_accelerators_that_support_it(device: str, expected: bool) -> None:
    """The default of pin_memory depends on the device."""
    loader = build_dataloader({"dataset": DATA}, seed=0, training=True, device=torch.device(device))
    assert loader.loader.pin_memory is expected


@pytest.mark.parametrize("value", [True, False])
def test_a_configured_pin_memory_is_kept(value: bool) -> None:
    """The option of a configuration and that of a loader object are not changed, whatever the device."""
    for dataloader in ({"dataset": DATA, "pin_memory": value}, DataLoader(DATA, pin_memory=value)):  # type: ignore[arg-type]
        for device in ("cpu", "cuda"):
            loader = build_dataloader(dataloader, seed=0, training=True, device=torch.device(device))
            assert loader.loader.pin_memory is value
    assert "copies to cuda:0 block, because pin_memory is False" in build_dataloader(
        {"dataset": DATA, "pin_memory": False}, seed=0, training=True, device=CUDA
    ).describe_copies(CUDA)


def test_reading_a_loader_with_a_state_ahead_is_rejected() -> None:
    """With device_prefetch=True and a stateful stream, a resumed run would skip the batch that was read ahead."""
    with pytest.raises(ConfigValueError, match=r"Resumable\.state_dict\(\), which would include the batch"):
        build_dataloader({"dataset": Resumable(), "device_prefetch": True}, seed=0, training=True)


@pytest.mark.parametrize(
    ("options", "device", "error", "message"),
    [
        (
            {"device_prefetch": True, "pin_memory": False},
            "cuda",
            ConfigValueError,
            "requires pinned memory.*Remove one",
        ),
        ({"device_prefetch": True}, "mps", ConfigValueError, "which mps does not have"),
        ({"device_prefetch": "yes"}, "cpu", ConfigTypeError, "True, False or None, got 'yes'"),
    ],
)
def test_an_impossible_device_prefetch_is_rejected(
    options: dict[str, Any], device: str, error: type[Exception], message: str
) -> None:
    """Each error names the option and what to change."""
    with pytest.raises(error, match=message):
        build_dataloader({"dataset": DATA, **options}, seed=0, training=True, device=torch.device(device))
