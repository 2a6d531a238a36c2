"""Data loaders and iterable datasets that save their position in a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, final, runtime_checkable

from torch.utils.data import IterableDataset

__all__ = ["Stateful", "StatefulStream", "ResumableStream"]


@runtime_checkable
class Stateful(Protocol):
    """A data loader or dataset with a state dict, such as torchdata's ``StatefulDataLoader``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch; prefetched batches are not counted."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position, from which the next iteration continues."""


class StatefulStream(Stateful, Protocol):
    """An iterable dataset with a state dict."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from the current position."""


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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the dataset, and whether it was exhausted."""
        return {"dataset": self.dataset.state_dict(), "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. If the dataset was exhausted, the next iteration is empty and the one after it starts over."""
        self.dataset.load_state_dict(state["dataset"])
        self._ended = self._skip_epoch = state["ended"]
