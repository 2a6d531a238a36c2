"""Loaders that can begin anywhere in an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from stratagem.data.batches import (
    ConsumedSamples,
    EpochBatches,
    OpaqueBatches,
    PositionedBatches,
    RankBatches,
    advanced,
)
from stratagem.data.rank_share import IsolatedIterator, RankShare, length_of, require_same_batches
from stratagem.data.samplers import UnpaddedSampler
from stratagem.data.stateful import ResumableStream, Stateful
from stratagem.data.streams import StreamedDataset, isolate_cpu_rng, seed_stream
from stratagem.data.workers import WorkerInit, report_dead_workers, start_workers
from stratagem.distributed import get_rank
from stratagem.errors import CheckpointMismatchError, ConfigValueError, StateError

__all__ = ["EpochLoader"]


@final
@dataclass(frozen=True, slots=True)
class _ResumePoint:
    """Where the position was taken up last: what of the data was taken before batch ``batch`` of ``epoch``."""

    epoch: int
    batch: int
    consumed: ConsumedSamples


@final
@dataclass(frozen=True, slots=True)
class _LoaderState:
    """The state of a loader that keeps its own position, as it was before batch ``batch`` of ``epoch``.

    ``restored`` tells that it comes from a checkpoint, so that the loader knows nothing of it yet.
    """

    epoch: int
    batch: int
    state: dict[str, Any]
    restored: bool


@final
class EpochLoader:
    """A ``DataLoader`` whose iteration is asked for by epoch and position.

    Args:
        loader: any ``DataLoader``. One that :func:`~stratagem.data.build_dataloader` made of a built-in sampler begins
            anywhere at no cost, one that has ``state_dict`` is restored from its state, and others draw and drop what was
            seen.
        world_size: the number of data-parallel ranks that its batches are divided among.
        seed: of the random numbers that a stream draws, if its batches are divided here; the same on every rank.
        share: which of the loader's batches this rank takes, if the loader gives all of them on every rank; None if it
            gives this rank's alone.
    """

    def __init__(
        self, loader: DataLoader[Any], *, world_size: int = 1, seed: int = 0, share: RankShare | None = None
    ) -> None:
        self.loader = loader
        self.share = share
        self._world_size = world_size
        self._seed = seed
        self._leftover: Any = None
        batches = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self._batches = batches if isinstance(batches, EpochBatches) else None
        # That of a loader that keeps its own state is its (batch) sampler itself.
        source = self._given = batches if self._batches is None else self._batches.source
        self._source = source if isinstance(source, PositionedBatches) else None
        self._resume_point = _ResumePoint(0, 0, ())
        self._stateful = self._find_stateful()
        self._kept: _LoaderState | None = None

    @property
    def dataset(self) -> Any:
        """The dataset that is loaded."""
        dataset = self.loader.dataset
        return dataset.dataset if isinstance(dataset, StreamedDataset | ResumableStream) else dataset

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """What makes a batch of samples."""
        dataset = self.loader.dataset
        return dataset.collate if isinstance(dataset, StreamedDataset) else self.loader.collate_fn

    @property
    def batch_size(self) -> int | None:
        """How many samples a batch of this rank has; None where the loader does not say."""
        batches = self.loader.batch_sampler if self._batches is None else self._batches
        size = self.loader.batch_size if batches is None else getattr(batches, "batch_size", None)
        return size if isinstance(size, int) else None

    @property
    def length(self) -> int | None:
        """How many batches an epoch of this rank has; None for streams and samplers without a length.

        That of a stream is an estimate if several workers read it; see :attr:`slack`.
        """
        total = self._length_of_loader()
        return total if total is None or self.share is None else self.share.count(total)

    @property
    def slack(self) -> int:
        """How many batches more than :attr:`length` an epoch may have: each worker of a stream ends with a short batch."""
        total, loader = self._length_of_loader(), self.loader
        if total is None or not isinstance(self.dataset, IterableDataset) or loader.drop_last:
            return 0
        most = total + max(0, loader.num_workers - 1)
        return most - total if self.share is None else self.share.count(most) - self.share.count(total)

    @property
    def by_batch(self) -> bool:
        """Whether the ranks take turns at whole batches, rather than at samples."""
        given = self._given
        return given.by_batch if isinstance(given, PositionedBatches | OpaqueBatches) else self.share is not None

    @property
    def division(self) -> str:
        """How the data is divided among the data-parallel ranks, as a phrase for the log."""
        order = self._given
        fixed = order.share is None if isinstance(order, OpaqueBatches) else self.share is None
        if self._world_size == 1:
            return "for one data-parallel rank"
        ranks = f"{self._world_size} data-parallel ranks"
        if isinstance(order, PositionedBatches) or not fixed:
            unit = "batches" if self.by_batch else "samples"
            reading = "" if self.share is None else ", each of which reads all of them"
            return f"the {unit} divided among {ranks}{reading}"
        return f"already divided among {ranks}, taken as it is"

    def describe(self) -> str:
        """Return in one line what the loader gives, in which order, and how it is divided among the ranks."""
        dataset, order = self.dataset, self._given
        kind = type(dataset).__name__
        if isinstance(dataset, IterableDataset):
            samples = length_of(dataset)
            what = f"stream {kind} " + ("of unknown length" if samples is None else f"of {samples:,} samples")
        else:
            samples = length_of(dataset)
            what = kind if samples is None else f"{samples:,} samples of {kind}"
            sampler = order.sampler if isinstance(order, OpaqueBatches | RankBatches) else order
            inner = sampler.sampler if type(sampler) is BatchSampler else sampler
            inner = inner.sampler if isinstance(inner, UnpaddedSampler) else inner
            what += f" in the order of {type(inner).__name__}"
        size = self.batch_size
        batches = "" if size is None else f", batches of {size}"
        return f"{what}{batches}, {self.division}"

    @property
    def leftover(self) -> Any:
        """A batch of the last round of the latest epoch, if other ranks had one and this rank did not; else None."""
        return self._leftover

    @property
    def positioned(self) -> bool:
        """Whether the place of each sample is known, so that a position is taken up without drawing what came before."""
        return self._source is not None

    @property
    def resume_warning(self) -> str | None:
        """Why a run that is stopped inside of an epoch may not go on exactly; None where it does."""
        if self._source is not None or self._stateful is not None:
            return None
        dataset = self.dataset
        if not isinstance(dataset, IterableDataset):
            return (
                "The order of the training data is that of its own loader or sampler: a run that is stopped inside of an "
                "epoch draws again what it has seen, to go on behind it, and goes on exactly only if the order is the same "
                "each time. A sampler of ours, or a loader with state_dict and load_state_dict, goes on without that."
            )
        name = type(dataset).__name__
        if isinstance(dataset, Stateful) and self.loader.num_workers:
            return (
                f"{name} has state_dict, but each of num_workers={self.loader.num_workers} workers iterates a copy of it, "
                "whose state cannot be asked for: a run that is stopped inside of an epoch reads again what it has seen. "
                "Take num_workers=0, or torchdata's StatefulDataLoader, to go on exactly."
            )
        return (
            f"{name} is a stream without state_dict and load_state_dict: a run that is stopped inside of an epoch reads "
            "again what it has seen, and goes on exactly only if the stream is the same each time."
        )

    def batches(self, epoch: int, done: int = 0) -> Iterator[Any]:
        """Begin an epoch after its first ``done`` batches.

        Raises:
            TrainingError: while iterating, if a data worker died.
        """
        if isinstance(self.loader.worker_init_fn, WorkerInit):
            self.loader.worker_init_fn.begin(epoch)
        if self._source is not None and self._batches is not None:
            self._batches.set_requests(self._source.requests_from(self._epoch_of(epoch), self.consumed(epoch, done)))
            return self._with_worker_errors(start_workers(self.loader))
        if self._batches is not None and isinstance(self._batches.source, OpaqueBatches):
            self._batches.set_requests(self._batches.source.requests_from(epoch, done))
            return self._begin(epoch)
        self._set_epoch_of_parts(epoch)
        if self._stateful is not None:
            return self._from_state(self._stateful, epoch, done)
        return islice(self._begin(epoch), done, None)

    def indices_of(self, epoch: int, batch: int) -> list[Any]:
        """Return which samples this rank's batch has, counted from 0: the dataset's indices. Computed when asked.

        Raises:
            StateError: if the order of the data is not ours, so that nobody knows without drawing it.
            ConfigValueError: if the epoch has no such batch.
        """
        if self._source is None:
            raise StateError(
                "The order of the data is that of its own loader or sampler, so its samples are not known."
            )
        for draw in self._source.requests_from(self._epoch_of(epoch), self.consumed(epoch, batch)):
            return list(draw.indices)
        raise ConfigValueError(f"Epoch {epoch} has no batch {batch}; it has {self.length}.")

    # ---- the position, for checkpoints -----------------------------------------------------------------------------

    def consumed(self, epoch: int, batch: int) -> ConsumedSamples:
        """Return what of the data of all ranks is taken before this batch: pairs (samples of a batch, batches).

        That does not depend on the number of ranks, so others can go on from it. Data without end is counted from the
        beginning of the run.
        """
        if self._source is None:
            return ()
        anchor = self._resume_point
        if self._source.endless:
            length = len(self._source)
            # An epoch in which the batch size changed may be longer or shorter than the others.
            passed = max(length - anchor.batch, 0) + (epoch - anchor.epoch - 1) * length
            batches = batch - anchor.batch if epoch == anchor.epoch else passed + batch
            return advanced(anchor.consumed, self._source.batch_size, batches * self._world_size)
        if epoch == anchor.epoch and batch >= anchor.batch:
            return advanced(anchor.consumed, self._source.batch_size, (batch - anchor.batch) * self._world_size)
        return advanced((), self._source.batch_size, batch * self._world_size)

    def resume_at(self, epoch: int, batch: int, consumed: Sequence[Sequence[int]]) -> int:
        """Take up a position that was saved, perhaps with other ranks or another batch size.

        Args:
            epoch: that is under way.
            batch: of the epoch, in the batches of the run that was saved.
            consumed: what :meth:`consumed` returned there.

        Returns:
            The batch of this loader's epoch that comes next. It is such that the epoch ends with its last batch, so what
            is left of the epoch is what was not taken.
        """
        if self._source is None:
            return batch
        pairs = tuple((int(size), int(batches)) for size, batches in consumed)
        if not self._source.endless:
            batch = self._source.left() - self._source.left(epoch, pairs)
        self._resume_point = _ResumePoint(epoch, batch, pairs)
        return batch

    @property
    def is_stateful(self) -> bool:
        """Whether the loader or its dataset knows its position itself, so that its state belongs into a checkpoint."""
        return self._stateful is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loader or dataset that knows its position: after the batch that was given out last.

        Raises:
            StateError: if it does not keep any.
        """
        if self._stateful is None:
            raise StateError("The loader has no state of its own; consumed() returns its position.")
        return self._stateful.state_dict() if self._kept is None else self._kept.state

    def load_state_dict(self, state: Mapping[str, Any], *, epoch: int, batch: int) -> None:
        """Have ``batches(epoch, batch)`` go on from a state.

        Raises:
            CheckpointMismatchError: if the loader keeps no state.
        """
        if self._stateful is None:
            raise CheckpointMismatchError(
                "The checkpoint holds the state of a data loader, and this run's has no load_state_dict. "
                "Resume with the loader that it was saved with."
            )
        self._kept = _LoaderState(epoch, batch, dict(state), restored=True)

    def _epoch_of(self, epoch: int) -> int:
        return 0 if self._source is not None and self._source.endless else epoch

    def _find_stateful(self) -> Stateful | None:
        """Return what knows the position where it is not the sampler: the loader, or a stream that no worker copies."""
        if isinstance(self.loader, Stateful):
            return self.loader
        return self.loader.dataset if isinstance(self.loader.dataset, ResumableStream) else None

    def _set_epoch_of_parts(self, epoch: int) -> None:
        """Call ``set_epoch`` of the dataset's stream, the batch sampler and the sampler, of those that have it."""
        batch_sampler = self.loader.batch_sampler
        sampler = self.loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
        stream = self.dataset if isinstance(self.dataset, IterableDataset) else None
        for part in (stream, batch_sampler, sampler):
            setter = getattr(part, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def _from_state(self, stateful: Stateful, epoch: int, done: int) -> Iterator[Any]:
        """Yield the batches of a loader that keeps its position; where it stands is remembered if it is left early."""
        kept, self._kept = self._kept, None
        # A run that was stopped after an epoch's last batch begins the next one with the state of that place.
        known = kept is not None and (kept.restored or (kept.epoch, kept.batch) == (epoch, done))
        if kept is not None and known:
            stateful.load_state_dict(kept.state)
        given = done
        try:
            for batch in islice(self._begin(epoch), 0 if known else done, None):
                given += 1
                yield batch
            share = self._given.share if isinstance(self._given, OpaqueBatches) else self.share
            if given == 0 and (share is None or share.round_up):
                # It stood at the end of the epoch before. In evaluation, a rank may have no batch while others do.
                for batch in self._begin(epoch):
                    given += 1
                    yield batch
        except GeneratorExit:
            self._kept = _LoaderState(epoch, given, stateful.state_dict(), restored=False)
            raise

    def _begin(self, epoch: int) -> Iterator[Any]:
        """Begin an iteration of a loader that is not built here, without changing the model's generators."""
        # What all ranks read must not depend on the rank.
        keys = (torch.initial_seed(), epoch, get_rank()) if self.share is None else (self._seed, epoch)
        if self.loader.generator is not None:
            batches = start_workers(self.loader)
        else:
            # Torch draws the workers' seed, and with workers perhaps the order, from the global generator: a run that
            # begins an epoch once more, in its middle, would give its dropout other numbers.
            with isolate_cpu_rng():
                seed_stream(*keys)
                batches = start_workers(self.loader)
        told = self._with_worker_errors(batches)
        return told if self.share is None else self._divided(IsolatedIterator(told, *keys, "batches"), self.share)

    def _divided(self, batches: Iterator[Any], share: RankShare) -> Iterator[Any]:
        """Yield this rank's batch of each round; every rank reads all of them."""
        self._leftover = None
        compared = False
        while True:
            if compared:
                own, first, count = _keep_own(batches, share)
            else:
                round_ = list(islice(batches, share.size))
                require_same_batches(self._name, round_)
                own, first, count = _keep_own(iter(round_), share)
                compared = True
            if share.rank < count:
                yield own
            elif count and share.round_up:
                yield first
            elif count:
                self._leftover = first
            if count < share.size:
                return

    @property
    def _name(self) -> str:
        kind = type(self.dataset if isinstance(self.dataset, IterableDataset) else self.loader)
        return kind.__name__

    def _length_of_loader(self) -> int | None:
        """Return the number of batches that the loader itself gives in an epoch; None if it has no length."""
        loader, dataset = self.loader, self.dataset
        if not isinstance(dataset, IterableDataset) or type(loader).__len__ is not DataLoader.__len__:
            return length_of(loader)
        # Torch's own length makes it warn if a worker's short last batch exceeds it.
        samples, size = length_of(dataset), loader.batch_size
        if samples is None or size is None:
            return samples
        return samples // size if loader.drop_last else -(-samples // size)

    def _with_worker_errors(self, batches: Iterator[Any]) -> Iterator[Any]:
        # Torch keeps its processes to itself; without them the error names the process id alone.
        with report_dead_workers(getattr(batches, "_workers", ())):
            yield from batches


def _keep_own(batches: Iterator[Any], share: RankShare) -> tuple[Any, Any, int]:
    """Read one round; return this rank's batch, the first one, and how many there were."""
    own = first = None
    count = 0
    for count, batch in enumerate(islice(batches, share.size), 1):
        first = batch if count == 1 else first
        own = batch if count == share.rank + 1 else own
    return own, first, count
