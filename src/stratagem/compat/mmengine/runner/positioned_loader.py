"""Data loaders that start at any position, so that a run that stopped within an epoch continues with the next sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader, IterableDataset

from stratagem.data import EpochLoader, build_dataloader
from stratagem.data.rank_share import declared_share
from stratagem.utils import generator_state, restore_generator_state

__all__ = ["LoaderPosition", "PositionedLoader", "iterate", "position_of", "sampler_of", "track_position"]


@final
class LoaderPosition:
    """The position in a data loader.

    Attributes:
        epoch: the number of the current pass over the data, which the sampler gets by ``set_epoch``.
        batch: the number of batches of this pass that were read.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batch = 0
        self._resumed = False
        self._ended = False

    @property
    def next(self) -> tuple[int, int]:
        """The pass and the number of its batches before the next batch."""
        return (self.epoch + 1, 0) if self._ended else (self.epoch, self.batch)

    def end(self) -> None:
        """Record that a pass is complete."""
        self._ended = True

    def move_to(self, epoch: int, batch: int) -> None:
        """Make the next iteration continue at a position."""
        self.epoch, self.batch, self._resumed, self._ended = epoch, batch, True, False

    @property
    def pending(self) -> int:
        """The number of batches that the next iteration skips, because they were read before the run was resumed."""
        return self.batch if self._resumed else 0

    def begin(self, loader: DataLoader[Any]) -> tuple[int, int]:
        """Begin an iteration; return its pass and the number of batches to skip."""
        if self._resumed:
            self._resumed = False
        else:
            # Hooks and loops set the epoch of MMEngine's samplers.
            epoch = getattr(sampler_of(loader), "epoch", None)
            self.epoch = epoch if isinstance(epoch, int) else self.next[0]
            self.batch = 0
        self._ended = False
        return self.epoch, self.batch


@final
class PositionedLoader(DataLoader[Any]):
    """A ``DataLoader`` whose iteration can continue at any position.

    The samples of this rank are those of its sampler, in its order. With ``global_random_numbers``, it draws random numbers
    where MMEngine's loaders do: from the global generators of this process, and in workers that are seeded once per epoch.
    Otherwise, the numbers that a sample draws depend only on the seed, the epoch and the sample, and loading does not change
    the global generators.

    Args:
        seed: the seed of the random numbers of the samples.
        global_random_numbers: whether to use the global generators.
        arguments: the arguments of ``DataLoader``.
    """

    def __init__(self, *, seed: int, global_random_numbers: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.position = LoaderPosition()
        self._seed = seed
        self._global_random_numbers = global_random_numbers
        self._engine: tuple[tuple[Any, ...], EpochLoader] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch returns its own class of iterators
        if not self._global_random_numbers and not isinstance(self.dataset, IterableDataset):
            return self._positioned()
        epoch, done = self.position.begin(self)
        if done:
            set_epoch = getattr(sampler_of(self), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        # Begin and read past the batches without changing the restored state of the generators.
        state = generator_state() if done else {}
        batches = super().__iter__()
        if done:
            next(islice(batches, done - 1, done), None)
            restore_generator_state(state)
        return self._counted(batches)

    def reseed(self, seed: int) -> None:
        """Change the seed of the random numbers of the samples."""
        self._seed, self._engine = seed, None

    def _positioned(self) -> Iterator[Any]:
        # This begins when the first batch is requested, because a run may be resumed between the two.
        epoch, done = self.position.begin(self)
        yield from self._counted(self._epoch_loader().batches(epoch, done))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.position.batch += 1
            yield batch
        self.position.end()

    def _epoch_loader(self) -> EpochLoader:
        """Return the loader of the engine for the current attributes, which hooks may change between epochs."""
        names = ("dataset", "num_workers", "collate_fn", "worker_init_fn", "sampler", "batch_sampler")
        key = tuple(id(getattr(self, name)) for name in names)
        # Hooks set _iterator to None to restart persistent workers.
        restarts = self.persistent_workers and self._iterator is None
        if self._engine is None or self._engine[0] != key or restarts:
            self._engine = key, _build_engine_loader(self, self._seed)
        self._iterator = self._engine[1] if self.persistent_workers else None  # type: ignore[assignment]
        return self._engine[1]


def _build_engine_loader(loader: PositionedLoader, seed: int) -> EpochLoader:
    names = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    arguments = {name: getattr(loader, name) for name in names}
    if loader.batch_sampler is None:
        arguments |= {"sampler": loader.sampler, "batch_size": None}
    else:
        arguments["batch_sampler"] = loader.batch_sampler
    rank, size = _share_of(loader)
    return build_dataloader(arguments, seed=seed, rank=rank, world_size=size, training=True, is_divided=True)


def _share_of(loader: DataLoader[Any]) -> tuple[int, int]:
    """Return the rank whose data the loader yields, and the number of ranks: for MMEngine's samplers; all data is (0, 1)."""
    return declared_share(sampler_of(loader)) or declared_share(loader.batch_sampler) or (0, 1)


def sampler_of(loader: Any) -> Any:
    """Return the sampler of a loader, which may be part of its batch sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "sampler", None)
    return getattr(loader, "sampler", None) if inner is None else inner


@final
class _TrackedLoader:
    """Iterates over a ``DataLoader`` that the user has built, and records the position.

    Args:
        global_random_numbers: see :class:`PositionedLoader`.
    """

    def __init__(self, *, global_random_numbers: bool) -> None:
        self.position = LoaderPosition()
        self._global_random_numbers = global_random_numbers
        self._engine: EpochLoader | None = None

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the batches of the current pass, from the current position on."""
        epoch, done = self.position.begin(loader)
        if self._global_random_numbers:
            state = generator_state() if done else {}
            batches: Iterator[Any] = iter(loader)
            if done:
                next(islice(batches, done - 1, done), None)
                restore_generator_state(state)
        else:
            if self._engine is None:
                # The initial seed of the generator is part of its state, which a resumed run restores.
                rank, size = _share_of(loader)
                self._engine = build_dataloader(
                    loader,
                    seed=torch.initial_seed(),
                    rank=rank,
                    world_size=size,
                    training=True,
                    is_divided=True,
                )
            batches = self._engine.batches(epoch, done)
        for batch in batches:
            self.position.batch += 1
            yield batch
        self.position.end()


_tracked: WeakKeyDictionary[DataLoader[Any], _TrackedLoader] = WeakKeyDictionary()


def track_position(loader: Any, *, global_random_numbers: bool) -> None:
    """Record the position in a loader when :func:`iterate` iterates over it."""
    if isinstance(loader, DataLoader) and not isinstance(loader, PositionedLoader) and loader not in _tracked:
        _tracked[loader] = _TrackedLoader(global_random_numbers=global_random_numbers)


def iterate(loader: Any) -> Iterator[Any]:
    """Return an iterator over a loader that begins at its position."""
    tracked = _tracked.get(loader) if isinstance(loader, DataLoader) else None
    return iter(loader) if tracked is None else tracked.batches(loader)


def position_of(loader: Any) -> LoaderPosition | None:
    """Return the position of a loader; None if it does not record it."""
    if isinstance(loader, PositionedLoader):
        return loader.position
    tracked = _tracked.get(loader) if isinstance(loader, DataLoader) else None
    return None if tracked is None else tracked.position
