"""Copy the next batch to the device while the model computes on the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch

__all__ = ["AcceleratorCopyStream", "CopyStream", "copy_ahead", "supports_pinned_memory"]

# Types of devices to which torch cannot copy from pinned memory.
_WITHOUT_PINNED_MEMORY = frozenset({"cpu", "meta", "mps"})


def supports_pinned_memory(device: torch.device) -> bool:
    """Return whether torch can copy asynchronously from pinned memory to a device."""
    return device.type not in _WITHOUT_PINNED_MEMORY


class CopyStream(Protocol):
    """A queue of copies to a device, which run while the device computes."""

    def copy(self, host: Any) -> tuple[Any, Any]:
        """Start to copy a batch. Return the copy, and an event that occurs when it is complete."""

    def wait(self, event: Any) -> None:
        """Make the computations that are started from now on wait for an event. The host does not wait."""


@final
class AcceleratorCopyStream:
    """A side stream of an accelerator.

    Memory that the copies occupied returns to the side stream when the last reference to a copy is deleted. A later copy could
    therefore overwrite it while computations that were started before still read it. To prevent this, each copy waits for
    everything that was started before it. This needs no ``record_stream``, applies to tensors in objects of any type, and uses
    the memory of three batches, however far the host is ahead of the device. The copy of the next batch still overlaps with the
    computations on the current one, because it is started before them.

    Args:
        device: the accelerator.
        move: starts to copy a batch to the device without waiting, and returns the copy.
    """

    def __init__(self, device: torch.device, move: Callable[[Any], Any]) -> None:
        self._device = device
        self._move = move
        self._stream = torch.Stream(device)

    def copy(self, host: Any) -> tuple[Any, Any]:
        """Start to copy a batch. Return the copy, and an event that occurs when it is complete."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            copied = self._move(host)
        return copied, self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the current stream of the device wait for an event. The host does not wait."""
        torch.accelerator.current_stream(self._device).wait_event(event)


@final
@dataclass(frozen=True, slots=True)
class _Copying:
    host: Any
    copy: Any
    event: Any


def copy_ahead(batches: Iterator[Any], stream: CopyStream) -> Iterator[tuple[Any, Any]]:
    """Yield batches and their copies on the device. Before a batch is yielded, the copy of the next one is started.

    An error of ``batches`` is raised after all earlier batches were yielded, as without reading ahead.

    Args:
        batches: the batches in the memory of the host.
        stream: copies them.
    """
    following = _next_copy(batches, stream)
    while following is not None:
        if isinstance(following, Exception):
            raise following
        current = following
        stream.wait(current.event)
        following = _next_copy(batches, stream)
        yield current.host, current.copy


def _next_copy(batches: Iterator[Any], stream: CopyStream) -> _Copying | Exception | None:
    """Start to copy the next batch; return None if there is none, and an error instead of raising it."""
    try:
        host = next(batches)
        return _Copying(host, *stream.copy(host))
    except StopIteration:
        return None
    except Exception as error:  # noqa: BLE001 -- raised when the batch is requested
        return error
