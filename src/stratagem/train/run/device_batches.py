"""Batches on the device of the model, copied while the previous batch is processed."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any, final

from stratagem.data import AcceleratorCopyStream, CopyStream, EpochLoader, copy_ahead, supports_pinned_memory
from stratagem.errors import ConfigValueError
from stratagem.model import BaseDataPreprocessor, pin_tensors, to_device
from stratagem.train.run.context import Run

__all__ = ["device_batches", "with_device_batches"]


def device_batches(run: Run, loader: EpochLoader, batches: Iterator[Any]) -> Iterator[Any]:
    """Return an iterator over ``batches`` on the model's device if the loader reads ahead, and ``batches`` otherwise.

    Args:
        run: the run.
        loader: the loader of the batches.
        batches: yields the batches of the loader.

    Raises:
        ConfigValueError: if ``device_prefetch=True`` conflicts with blocking copies of the model's data preprocessor.
    """
    stream = _copy_stream(run, loader)
    return batches if stream is None else (copy for _, copy in copy_ahead(batches, stream))


def with_device_batches(run: Run, loader: EpochLoader, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Return an iterator over pairs: a batch as the loader yielded it, and the batch from :func:`device_batches`."""
    stream = _copy_stream(run, loader)
    return ((batch, batch) for batch in batches) if stream is None else copy_ahead(batches, stream)


def _copy_stream(run: Run, loader: EpochLoader) -> CopyStream | None:
    if not loader.reads_ahead:
        return None
    if loader.must_read_ahead and _copies_block(_preprocessor(run)):
        raise ConfigValueError(
            "dataloader: device_prefetch=True copies batches without blocking, but the model's data_preprocessor has "
            "non_blocking=False. Remove one of the two options."
        )
    stream = _new_stream(run)
    return None if stream is None else _TimedCopyStream(stream, run)


def _new_stream(run: Run) -> CopyStream | None:
    """Return a stream that copies to the device of the model; None if the model has batches on the CPU or blocking copies."""
    device, preprocessor = run.world.device, _preprocessor(run)
    if isinstance(preprocessor, BaseDataPreprocessor):
        device = preprocessor.device  # the CPU if the weights are offloaded
    if _copies_block(preprocessor) or not supports_pinned_memory(device):
        return None
    return AcceleratorCopyStream(device, lambda host: to_device(pin_tensors(host), device, non_blocking=True))


def _preprocessor(run: Run) -> Any:
    return getattr(run.strategy.unwrap_model(), "data_preprocessor", None)


def _copies_block(preprocessor: Any) -> bool:
    return isinstance(preprocessor, BaseDataPreprocessor) and preprocessor.non_blocking is False


@final
class _TimedCopyStream:
    """Excludes the time for starting copies from the time that the loop waits for data."""

    def __init__(self, stream: CopyStream, run: Run) -> None:
        self._stream = stream
        self._timer = run.step_timer

    def copy(self, host: Any) -> tuple[Any, Any]:
        """Start to copy a batch, and shift the start of the wait by the time that this takes."""
        begin = perf_counter()
        started = self._stream.copy(host)
        self._timer.waiting_since += perf_counter() - begin
        return started

    def wait(self, event: Any) -> None:
        """Make the computations that are started from now on wait for an event."""
        self._stream.wait(event)
