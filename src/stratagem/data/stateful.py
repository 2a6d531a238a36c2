"""Loaders and streams that know where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, final, runtime_checkable

from torch.utils.data import IterableDataset

__all__ = ["Stateful", "StatefulStream", "ResumableStream"]


@runtime_checkable
class Stateful(Protocol):
    """A loader or a dataset that can say where it stands, as torchdata's ``StatefulDataLoader`` can."""

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands: after the batches that were given out, not those that were fetched ahead."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the next iteration go on from there."""


class StatefulStream(Stateful, Protocol):
    """A stream of samples that can say where it stands."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from where it stands."""


@final
class ResumableStream(IterableDataset[Any]):
    """A stream with a state, in the main process, where nothing is fetched ahead.

    It adds to the stream's state whether it had come to its end, since a stream may then say that it stands at its
    beginning.

    Args:
        dataset: the stream.
    """

    def __init__(self, dataset: StatefulStream) -> None:
        self.dataset = dataset
        self._ended = False
        self._give_nothing = False

    def __iter__(self) -> Iterator[Any]:
        if self._give_nothing:
            self._give_nothing = False
            return
        self._ended = False
        yield from self.dataset
        self._ended = True

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # as TypeError says where it has no length

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state, and whether it has ended."""
        return {"dataset": self.dataset.state_dict(), "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; where the stream had ended, the next iteration is empty, and the one after it begins anew."""
        self.dataset.load_state_dict(state["dataset"])
        self._ended = self._give_nothing = state["ended"]
