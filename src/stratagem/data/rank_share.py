"""Split the data of custom samplers, datasets and loaders across the data-parallel ranks.

Every rank generates the full sample order and keeps its share, so the order must be identical on all ranks. Therefore
custom samplers run with separate generator states that depend only on the seed and the epoch, and the ranks compare the
resulting orders.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, TypeGuard, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from stratagem.data.seeding import isolate_cpu_rng
from stratagem.data.stateful import Stateful
from stratagem.data.streams import seed_stream
from stratagem.distributed import all_gather_object, broadcast_object, get_world_size
from stratagem.errors import ConfigValueError

__all__ = [
    "IsolatedIterator",
    "RankItems",
    "RankShare",
    "declared_share",
    "forms_plain_batches",
    "length_of",
    "require_same_batches",
]

# The number of items to compare between ranks if a sampler has no length.
_COMPARED_ITEMS = 65_536
# The maximum depth at which nested batches are compared; they may contain reference cycles.
_MAX_DEPTH = 8
# Samplers that draw the whole order, or the seed of their own generator, before the first item.
_TORCH_SAMPLERS = frozenset({RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler})
# The module of torchdata's samplers, which torchdata's StatefulDataLoader uses instead of torch's.
_TORCHDATA_SAMPLERS = "torchdata.stateful_dataloader.sampler"


@final
@dataclass(frozen=True, slots=True)
class RankShare:
    """A rank's share of a round-robin distribution: one of every ``size`` consecutive items.

    Attributes:
        rank: the data-parallel rank of this process.
        size: the number of data-parallel ranks.
        round_up: whether to pad the last round from the beginning of the order, so that all ranks have the same number of
            items. Training requires it; evaluation must not see an item twice.
        is_divided: whether the items of custom samplers are this rank's share already.
    """

    rank: int = 0
    size: int = 1
    round_up: bool = True
    is_divided: bool = False

    def count(self, total: int) -> int:
        """Return this rank's number of items out of ``total``."""
        return -(-total // self.size) if self.round_up else len(range(self.rank, total, self.size))


def declared_share(part: Any) -> tuple[int, int] | None:
    """Return the rank and the number of ranks that a sampler, dataset or loader was built for.

    Both are read from the attributes ``rank`` and ``num_replicas`` (torch) or ``world_size`` (MMEngine and this
    package), ``process_index`` and ``num_processes`` (Accelerate), or from the result of ``split_dataset_by_node`` of
    Hugging Face ``datasets``. Returns None if there are no such attributes or the number of ranks is 1.
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
    """Iterate with separate states of the global generators, isolated from all other code.

    Attributes:
        iterator: the iterator over the items. It is created at once, because some iterators, such as those of torchdata's
            samplers, draw random numbers when they are created.

    Args:
        items: the iterable.
        keys: identify the random stream; see :func:`~stratagem.data.stream_seed`.
    """

    def __init__(self, items: Iterable[Any], *keys: object) -> None:
        self._items = items
        self._numpy = np.random.MT19937(0)
        self._has_drawn = False
        with isolate_cpu_rng(self._numpy):
            seed_stream(*keys)
            self.iterator: Iterator[Any] = iter(items)
            self._states = random.getstate(), torch.default_generator.get_state()

    def __next__(self) -> Any:
        if self._has_drawn:
            return next(self.iterator)
        self._has_drawn = _draws_with_first_item(self._items)
        with isolate_cpu_rng(self._numpy):
            random.setstate(self._states[0])
            torch.default_generator.set_state(self._states[1])
            try:
                return next(self.iterator)
            finally:
                self._states = random.getstate(), torch.default_generator.get_state()


def _draws_with_first_item(items: Any) -> bool:
    """Return whether a sampler uses the global generators at most for its first item, as the samplers of torch and torchdata do.

    A class declares that its samplers never use them with its own attribute ``uses_global_generators = False``. Subclasses do not
    inherit the declaration, because they may draw numbers.
    """
    kind = type(items.sampler if forms_plain_batches(items) else items)
    return (
        kind in _TORCH_SAMPLERS
        or kind.__dict__.get("uses_global_generators") is False
        or kind is _torchdata_class("RandomSampler")
    )


@final
class RankItems(Iterator[Any]):
    """Iterate over this rank's share of a sampler's items in one epoch.

    With several processes, the first item is collective: the ranks compare their orders, and use the order of rank 0 if
    they differ.

    Args:
        sampler: yields indices or lists of indices.
        share: this rank's share.
        keys: identify the epoch's random stream; the same on every rank.
    """

    def __init__(self, sampler: Iterable[Any], share: RankShare, *keys: object) -> None:
        self._name = type(sampler).__name__
        length = length_of(sampler)
        self._length = _COMPARED_ITEMS if length is None else length
        self._isolated = IsolatedIterator(sampler, *keys)
        self._items: Iterator[Any] = self._isolated
        self._share = share
        self._first: list[Any] = []
        self._num_drawn = 0
        self._compared = False

    def __next__(self) -> Any:
        if not self._compared:
            self._compare()
        size, rank = self._share.size, self._share.rank
        items = list(islice(self._items, size))
        self._num_drawn += len(items)
        if len(self._first) < size:
            self._first += items[: size - len(self._first)]
        if items and self._share.round_up:
            items += islice(cycle(self._first), size - len(items))
        if rank >= len(items):
            raise StopIteration
        return items[rank]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the number of drawn items, and the state of the sampler's iterator if it has one."""
        inner = self._isolated.iterator
        return {
            "sampler": inner.state_dict() if isinstance(inner, Stateful) else None,
            "taken": self._num_drawn,
            "first": list(self._first),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        inner = self._isolated.iterator
        self._num_drawn, self._first = state["taken"], list(state["first"])
        if isinstance(inner, Stateful) and state["sampler"] is not None:
            inner.load_state_dict(state["sampler"])
            return
        if not self._compared:
            self._compare()
        for _ in islice(self._items, self._num_drawn):
            pass

    def _compare(self) -> None:
        self._compared = True
        if get_world_size() == 1:
            return
        inner = self._isolated.iterator
        if isinstance(inner, Stateful):
            state = inner.state_dict()
            if _differ(_digest_of(state)):
                inner.load_state_dict(broadcast_object(state))
            self._compare_round()
            return
        # Drawing one more item than the length shows whether the sampler ends there.
        drawn = list(islice(self._isolated, self._length + 1))
        ended = len(drawn) <= self._length
        if _differ(_digest_of([ended, *drawn])):
            if not all(all_gather_object(ended)):
                raise ConfigValueError(
                    f"{self._name} yields different indices on different ranks and does not end after {self._length} of "
                    f"them (the first on this rank are {drawn[:8]}). Seed its generator identically on all ranks, or set "
                    "its attributes `num_replicas` and `rank` if each rank draws a different part."
                )
            drawn = broadcast_object(drawn)
        self._items = chain(drawn, () if ended else self._isolated)

    def _compare_round(self) -> None:
        """Compare the next round. Equal states do not imply equal items, because torchdata's contain only what is stateful."""
        items = list(islice(self._isolated, self._share.size))
        if _differ(_digest_of(items)):
            raise ConfigValueError(
                f"{self._name} yields different indices on different ranks (the next on this rank are {items}), although its "
                "states are equal. Seed its generator identically on all ranks, or set its attributes `num_replicas` and "
                "`rank` if each rank draws a different part."
            )
        self._items = chain(items, self._isolated)


def require_same_batches(name: str, batches: Sequence[Any]) -> None:
    """Check that all ranks read the same batches before each keeps its share. Collective.

    Raises:
        ConfigValueError: if the batches differ.
    """
    if get_world_size() > 1 and _differ(_digest_of(list(batches))):
        raise ConfigValueError(
            f"{name} yields different data on different ranks. By default, every rank reads all data and keeps its share of "
            "the batches, which requires the same order on all ranks. If each rank reads a different part, set the "
            "attributes `num_replicas` (the number of data-parallel ranks) and `rank` of the object; otherwise seed its "
            "shuffling identically on all ranks."
        )


def _differ(digest: str) -> bool:
    return len(set(all_gather_object(digest))) > 1


def forms_plain_batches(sampler: Any) -> TypeGuard[BatchSampler]:
    """Return whether an object forms batches from consecutive items of its ``sampler``, exactly as torch's ``BatchSampler`` does.

    This is known of torch's ``BatchSampler``, of torchdata's, and of subclasses that inherit ``__iter__`` and ``__len__`` and
    store ``sampler``, ``batch_size`` and ``drop_last`` as plain attributes.
    """
    if type(sampler) is BatchSampler:
        return True
    if not isinstance(sampler, BatchSampler):
        return False
    kind, known = type(sampler), (BatchSampler, _torchdata_class("BatchSampler"))
    return (
        any(each is not None and kind.__iter__ is each.__iter__ for each in known)
        and kind.__len__ is BatchSampler.__len__
        and {"sampler", "batch_size", "drop_last"} <= vars(sampler).keys()
    )


def _torchdata_class(name: str) -> Any:
    """Return a class of torchdata's samplers; None if their module was not imported."""
    return getattr(sys.modules.get(_TORCHDATA_SAMPLERS), name, None)


def length_of(part: Any) -> int | None:
    """Return the length of a sampler, dataset or loader; None if it has no length."""
    try:
        return len(part)
    except (TypeError, NotImplementedError):
        return None


def _digest_of(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in _bytes_of(value):
        digest.update(chunk)
        digest.update(b"\0")
    return digest.hexdigest()


def _bytes_of(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Yield bytes that are equal on all ranks for equal values."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype}{tuple(plain.shape)}".encode()
        if plain.layout is torch.strided and plain.numel():
            yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_DEPTH:
        items = chain.from_iterable(value.items()) if isinstance(value, Mapping) else value
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in items:
            yield from _bytes_of(item, depth + 1)
    elif isinstance(value, bytes):
        yield value
    elif value is None or isinstance(value, int | float | complex | str | np.generic):
        yield repr(value).encode()
    else:
        # The repr of an object may contain its address.
        yield type(value).__name__.encode()
        if hasattr(value, "__dict__") and depth < _MAX_DEPTH:
            yield from _bytes_of(vars(value), depth + 1)
