"""Which part of a loader's data each data-parallel rank takes, where the order is that of the user's own objects.

Every rank draws the whole order and keeps its part of it, so all ranks must draw the same one. Random numbers that the
order is drawn with therefore come from a generator state of its own, which depends on the seed and the epoch alone, and
the ranks compare what they drew.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from stratagem.data.stateful import Stateful
from stratagem.data.streams import isolate_cpu_rng, seed_stream
from stratagem.distributed import all_gather_object, broadcast_object, get_world_size
from stratagem.errors import ConfigValueError

__all__ = ["IsolatedIterator", "RankItems", "RankShare", "declared_share", "length_of", "require_same_batches"]

# How many items of a sampler without a length the ranks compare.
_COMPARED = 65_536
# How deep the ranks look into nested batches, which may refer to themselves.
_DEPTH = 8
# They draw the whole order, or the seed of a generator of their own, before the first item.
_TORCH_SAMPLERS = frozenset({RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler})


@final
@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of the data that a rank takes: of every ``size`` items in a row, the one at position ``rank``.

    Attributes:
        rank: this process's data-parallel rank.
        size: the number of data-parallel ranks.
        round_up: whether the last round is filled up from the beginning of the order, so that all ranks have the same
            number of items. Training needs that; evaluation must not see an item twice.
    """

    rank: int = 0
    size: int = 1
    round_up: bool = True

    def count(self, total: int) -> int:
        """Return how many of ``total`` items this rank has."""
        return -(-total // self.size) if self.round_up else len(range(self.rank, total, self.size))


def declared_share(part: Any) -> tuple[int, int] | None:
    """Return the rank and the number of ranks that a sampler, a dataset or a loader is already divided for.

    These are ``rank`` and ``num_replicas`` (torch), ``world_size`` (MMEngine, this package), ``process_index`` and
    ``num_processes`` (Accelerate), or what ``split_dataset_by_node`` of Hugging Face ``datasets`` recorded. None if
    there is nothing of the kind, or if the part is for one process and so yields everything.
    """
    split = getattr(part, "_distributed", None)
    for owner, size_name, rank_name in (
        (part, "num_replicas", "rank"),
        (part, "num_processes", "process_index"),
        (part, "world_size", "rank"),
        (split, "world_size", "rank"),
    ):
        size, rank = getattr(owner, size_name, None), getattr(owner, rank_name, None)
        if isinstance(size, int) and isinstance(rank, int):
            return None if size == 1 else (rank, size)
    return None


@final
class IsolatedIterator(Iterator[Any]):
    """Iterates with states of the global generators that are its own, so that nothing else shifts them, or is shifted.

    Args:
        items: what is iterated.
        keys: identify the stream of random numbers; see :func:`~stratagem.data.stream_seed`.
    """

    def __init__(self, items: Iterable[Any], *keys: object) -> None:
        self._items = items
        self._keys = keys
        self._numpy = np.random.MT19937(0)
        self._states: tuple[Any, Tensor] | None = None
        self._has_drawn = False
        self.iterator: Iterator[Any] | None = None

    def begin(self) -> Iterator[Any]:
        """Return the iterator over the items, which is made when it is first needed."""
        if self.iterator is None:
            with isolate_cpu_rng(self._numpy):
                seed_stream(*self._keys)
                self.iterator = iter(self._items)
                self._states = random.getstate(), torch.default_generator.get_state()
        return self.iterator

    def __next__(self) -> Any:
        iterator = self.begin()
        if self._has_drawn:
            return next(iterator)
        self._has_drawn = _draws_with_first_item(self._items)
        with isolate_cpu_rng(self._numpy):
            if self._states is not None:
                random.setstate(self._states[0])
                torch.default_generator.set_state(self._states[1])
            try:
                return next(iterator)
            finally:
                self._states = random.getstate(), torch.default_generator.get_state()


def _draws_with_first_item(items: Any) -> bool:
    """Return whether a sampler uses the global generators for its first item alone, as all of torch's do."""
    sampler = items.sampler if type(items) is BatchSampler else items
    return type(sampler) in _TORCH_SAMPLERS


@final
class RankItems(Iterator[Any]):
    """This rank's share of what a sampler yields in one epoch.

    With several processes, the first item is requested on all of them together: they compare what they drew, and continue
    with the order of rank 0 if it differs. Collective then.

    Args:
        sampler: yields indices, or lists of them.
        share: which of them this rank takes.
        keys: identify the random numbers of the epoch; the same on every rank.
    """

    def __init__(self, sampler: Iterable[Any], share: RankShare, *keys: object) -> None:
        self._name = type(sampler).__name__
        length = length_of(sampler)
        self._length = _COMPARED if length is None else length
        self._isolated = IsolatedIterator(sampler, *keys)
        self._items: Iterator[Any] = self._isolated
        self._share = share
        self._first: list[Any] = []
        self._taken = 0
        self._compared = False

    def __next__(self) -> Any:
        if not self._compared:
            self._compare()
        size, rank = self._share.size, self._share.rank
        items = list(islice(self._items, size))
        self._taken += len(items)
        if len(self._first) < size:
            self._first += items[: size - len(self._first)]
        if items and self._share.round_up:
            items += islice(cycle(self._first), size - len(items))
        if rank >= len(items):
            raise StopIteration
        return items[rank]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: that of the sampler's iterator if it has a state, and how many items were drawn."""
        inner = self._isolated.begin()
        return {
            "sampler": inner.state_dict() if isinstance(inner, Stateful) else None,
            "taken": self._taken,
            "first": list(self._first),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        inner = self._isolated.begin()
        self._taken, self._first = state["taken"], list(state["first"])
        if isinstance(inner, Stateful) and state["sampler"] is not None:
            inner.load_state_dict(state["sampler"])
            return
        if not self._compared:
            self._compare()
        for _ in islice(self._items, self._taken):
            pass

    def _compare(self) -> None:
        self._compared = True
        if get_world_size() == 1:
            return
        inner = self._isolated.begin()
        if isinstance(inner, Stateful):
            state = inner.state_dict()
            if _differ(_digest_of(state)):
                inner.load_state_dict(broadcast_object(state))
            return
        # One more than its length shows whether it ends there.
        drawn = list(islice(self._isolated, self._length + 1))
        ended = len(drawn) <= self._length
        if _differ(_digest_of([ended, *drawn])):
            if not all(all_gather_object(ended)):
                raise ConfigValueError(
                    f"{self._name} yields different indices on different ranks and does not end after {self._length} of "
                    f"them (this rank drew {drawn[:8]} first). Seed its generator identically on all ranks, or give it "
                    "`num_replicas` and `rank` if each rank is to have a part of its own."
                )
            drawn = broadcast_object(drawn)
        self._items = chain(drawn, () if ended else self._isolated)


def require_same_batches(name: str, batches: Sequence[Any]) -> None:
    """Check that all ranks read the same batches, before each keeps its share of them. Collective.

    Raises:
        ConfigValueError: if they differ.
    """
    if get_world_size() > 1 and _differ(_digest_of(list(batches))):
        raise ConfigValueError(
            f"{name} gives different data on different ranks. By default every rank reads all of it and keeps its share of "
            "the batches, which needs the same order on all ranks. If each rank reads a part of its own, give the object "
            "the attributes `num_replicas` (the number of data-parallel ranks) and `rank`; otherwise seed its shuffling "
            "identically on all ranks."
        )


def _differ(digest: str) -> bool:
    return len(set(all_gather_object(digest))) > 1


def length_of(part: Any) -> int | None:
    """Return the length of a sampler, a dataset or a loader; None if it has none."""
    try:
        return len(part)
    except (TypeError, NotImplementedError):
        return None


def _digest_of(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces_of(value):
        digest.update(piece)
        digest.update(b"\0")
    return digest.hexdigest()


def _pieces_of(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Yield bytes that are the same on every rank for equal values."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype}{tuple(plain.shape)}".encode()
        if plain.layout is torch.strided and plain.numel():
            yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping | list | tuple) and depth < _DEPTH:
        items = chain.from_iterable(value.items()) if isinstance(value, Mapping) else value
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in items:
            yield from _pieces_of(item, depth + 1)
    elif isinstance(value, bytes):
        yield value
    elif value is None or isinstance(value, int | float | complex | str | np.generic):
        yield repr(value).encode()
    else:
        # The representation of an object may hold its address.
        yield type(value).__name__.encode()
        if hasattr(value, "__dict__") and depth < _DEPTH:
            yield from _pieces_of(vars(value), depth + 1)
