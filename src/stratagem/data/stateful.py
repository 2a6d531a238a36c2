"""Data loaders and iterable datasets that save their position in a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, final, runtime_checkable

from torch.utils.data import IterableDataset

from stratagem.data.epochs import set_epoch_of

__all__ = ["Stateful", "StatefulStream", "ResumableStream", "shuffle_buffer_of"]

# The attributes in which Hugging Face, torch and torchdata streams store the streams that they read from.
_SOURCES = (
    "_ex_iterable",
    "ex_iterable",
    "ex_iterables",
    "dataset",
    "datasets",
    "datapipe",
    "source_datapipe",
    "source",
)


@runtime_checkable
class Stateful(Protocol):
    """A data loader or dataset with a state dict, such as torchdata's ``StatefulDataLoader``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch; prefetched batches are not counted."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position; the next iteration continues from it."""


class StatefulStream(Stateful, Protocol):
    """An iterable dataset with a state dict."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from the current position."""


def shuffle_buffer_of(dataset: Any) -> int | None:
    """Return the size of the buffer in which a stream shuffles its samples; None if it has no such buffer.

    A state dict contains the position in the source but not the samples in the buffer, so a stream that continues from its
    state skips these samples and repeats others.
    """
    waiting, seen = [dataset], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        size = getattr(part, "buffer_size", None)
        if "shuffl" in type(part).__name__.lower() and isinstance(size, int):
            return size
        for name in _SOURCES:
            source = getattr(part, name, None)
            waiting += source if isinstance(source, list | tuple) else [] if source is None else [source]
    return None


@final
class ResumableStream(IterableDataset[Any]):
    """An iterable dataset with a state dict, in the main process, where nothing is prefetched.

    Its state also records whether the dataset was exhausted, because an exhausted dataset may report the same state as a
    new one.

    Args:
        dataset: the iterable dataset.
    """

    def __init__(self, dataset: StatefulStream) -> None:
        self.dataset = dataset
        self._ended = False
        self._skip_epoch = False

    def __iter__(self) -> Iterator[Any]:
        if self._skip_epoch:
            self._skip_epoch = False
            return
        self._ended = False
        yield from self.dataset
        self._ended = True

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # raises TypeError if it has no length

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the dataset."""
        set_epoch_of(self.dataset, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the dataset, and whether it was exhausted."""
        return {"dataset": self.dataset.state_dict(), "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. If the dataset was exhausted, the next iteration is empty and the one after it starts over."""
        self.dataset.load_state_dict(state["dataset"])
        self._ended = self._skip_epoch = state["ended"]
