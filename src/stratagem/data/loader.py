"""A data loader that starts at any position of an epoch, and saves its position in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from stratagem.data.batches import (
    ConsumedSamples,
    EpochBatches,
    OpaqueBatches,
    PositionedBatches,
    RankBatches,
    advanced,
)
from stratagem.data.copy_ahead import supports_pinned_memory
from stratagem.data.epoch_stream import EpochStream
from stratagem.data.epochs import set_epoch_of
from stratagem.data.in_process import batches_in_process, can_load_in_process
from stratagem.data.limits import BatchLimit
from stratagem.data.rank_share import IsolatedIterator, RankShare, forms_plain_batches, length_of, require_same_batches
from stratagem.data.samplers import UnpaddedSampler
from stratagem.data.seeding import isolate_cpu_rng
from stratagem.data.stateful import ResumableStream, Stateful, shuffle_buffer_of
from stratagem.data.streams import StreamedDataset, seed_stream
from stratagem.data.workers import WorkerInit, report_dead_workers, start_workers, workers_of
from stratagem.distributed import get_rank
from stratagem.errors import CheckpointMismatchError, ConfigValueError, StateError

__all__ = ["EpochLoader", "iterates_its_sampler"]


@final
@dataclass(frozen=True, slots=True)
class _ResumePoint:
    """The position of the last resume, with the samples consumed before batch ``batch`` of ``epoch``."""

    epoch: int
    batch: int
    consumed: ConsumedSamples


@final
@dataclass(frozen=True, slots=True)
class _LoaderState:
    """The state of a stateful loader before batch ``batch`` of ``epoch``.

    ``restored`` is True for a state from a checkpoint that has not been loaded into the loader yet.
    """

    epoch: int
    batch: int
    state: dict[str, Any]
    restored: bool


@final
class EpochLoader:
    """A wrapper around a ``DataLoader`` that iterates over a given epoch from a given batch.

    Args:
        loader: any ``DataLoader``. If :func:`~stratagem.data.build_dataloader` built it with a built-in sampler, it starts
            at any position without iterating to it. A loader with ``state_dict`` is restored from its state. Any other
            loader skips batches by iterating over them.
        world_size: the number of data-parallel ranks.
        seed: the seed of the random numbers of a stream whose batches this loader splits across the ranks; the same on
            every rank.
        share: this rank's share of the batches, if every rank iterates over all of them; None if the loader yields
            only the batches of this rank.

    Attributes:
        reads_ahead: whether the loops copy the next batch to the device while the model computes on the current one.
        must_read_ahead: whether the configuration requires this.
        limit: the limit of the number of batches; None if there is none.
    """

    def __init__(
        self, loader: DataLoader[Any], *, world_size: int = 1, seed: int = 0, share: RankShare | None = None
    ) -> None:
        self.loader = loader
        self.share = share
        self.reads_ahead = self.must_read_ahead = False
        self.limit: BatchLimit | None = None
        self._world_size = world_size
        self._seed = seed
        self._leftover: Any = None
        batches = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self._batches = batches if isinstance(batches, EpochBatches) else None
        # The (batch) sampler of a stateful loader is not wrapped.
        source = self._order = batches if self._batches is None else self._batches.source
        self._source = source if isinstance(source, PositionedBatches) else None
        self._resume_point = _ResumePoint(0, 0, ())
        self._stateful = self._find_stateful()
        self._saved_state: _LoaderState | None = None

    @property
    def dataset(self) -> Any:
        """The dataset of the loader."""
        dataset = self.loader.dataset
        return dataset.dataset if isinstance(dataset, StreamedDataset | ResumableStream | EpochStream) else dataset

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """The collate function."""
        dataset = self.loader.dataset
        return dataset.collate if isinstance(dataset, StreamedDataset) else self.loader.collate_fn

    @property
    def batch_size(self) -> int | None:
        """Samples per batch on this rank; None if it is unknown."""
        batches = self.loader.batch_sampler if self._batches is None else self._batches
        size = self.loader.batch_size if batches is None else getattr(batches, "batch_size", None)
        return size if isinstance(size, int) else None

    def last_batch(self, epoch: int) -> tuple[int, int] | None:
        """Return the index and the number of samples of the last batch of an epoch on this rank, if the sampler determines them.

        All other batches have :attr:`batch_size` samples. The index is -1 for an infinite order, in which no batch is smaller.
        None for orders whose batches differ, such as batches of groups, custom samplers and streams.
        """
        source, size = self._source, self.batch_size
        if not isinstance(source, RankBatches) or size is None:
            return None
        if source.endless:
            return -1, size
        point = self._resume_point
        before = point.consumed if epoch == point.epoch else ()
        left = source.left(epoch, before)
        first = point.batch if epoch == point.epoch else 0
        return first + left - 1, source.size_of_last(before)

    @property
    def length(self) -> int | None:
        """The number of batches per epoch on this rank; None for streams and samplers without a length.

        If several workers read a stream, this is an estimate; see :attr:`slack`.
        """
        total, limit = self._length_of_loader(), self.limit
        whole = total if total is None or self.share is None else self.share.count(total)
        if limit is None or (whole is None and not limit.exact):
            return whole
        count = limit.count(self._rounds)
        return count if whole is None else min(whole, count)

    @property
    def _rounds(self) -> int | None:
        """The number of batches per epoch without a limit, the same on every rank that reads all batches."""
        total = self._length_of_loader()
        return total if total is None or self.share is None else -(-total // self.share.size)

    @property
    def is_limited(self) -> bool:
        """Whether a limit ends an epoch before the end of the data."""
        rounds = self._rounds
        return self.limit is not None and (rounds is None or self.limit.count(rounds) < rounds)

    @property
    def slack(self) -> int:
        """The maximum number of batches beyond :attr:`length`: each worker's part of a stream may end with a smaller batch."""
        total, loader = self._length_of_loader(), self.loader
        if total is None or not isinstance(self.dataset, IterableDataset) or loader.drop_last or self.is_limited:
            return 0
        most = total + max(0, loader.num_workers - 1)
        return most - total if self.share is None else self.share.count(most) - self.share.count(total)

    @property
    def is_even(self) -> bool:
        """Whether every rank is known to have the same number of batches in each epoch of training."""
        if self._source is not None:
            return True
        order = self._order
        return isinstance(order, OpaqueBatches) and order.share is not None and length_of(order.sampler) is not None

    @property
    def by_batch(self) -> bool:
        """Whether whole batches, rather than samples, are distributed round-robin over the ranks."""
        given = self._order
        return given.by_batch if isinstance(given, PositionedBatches | OpaqueBatches) else self.share is not None

    @property
    def is_batched(self) -> bool:
        """Whether the items that the loader yields are batches of samples, rather than single items of the dataset."""
        return self.loader.batch_sampler is not None

    @property
    def is_split(self) -> bool:
        """Whether the data was already split across the ranks in an unknown way, rather than in turn by this package or torch."""
        order = self._order
        if isinstance(order, OpaqueBatches):
            sampler = order.sampler.sampler if forms_plain_batches(order.sampler) else order.sampler
            return order.share is None and not isinstance(sampler, UnpaddedSampler)
        return not isinstance(order, PositionedBatches) and self.share is None

    def batch_sizes(self, epoch: int = 0) -> Iterator[int] | None:
        """Return the number of samples in each batch of this rank; None if it is only known after loading the batches."""
        if self._source is None:
            return None
        return (
            len(request.indices)
            for request in self._source.requests_from(self._epoch_of(epoch), self.consumed(epoch, 0))
        )

    @property
    def division(self) -> str:
        """A phrase for the log that describes how the data is split across the data-parallel ranks."""
        order = self._order
        fixed = order.share is None if isinstance(order, OpaqueBatches) else self.share is None
        if self._world_size == 1:
            return "for one data-parallel rank"
        ranks = f"{self._world_size} data-parallel ranks"
        if isinstance(order, PositionedBatches) or not fixed:
            unit = "batches" if self.by_batch else "samples"
            reading = "" if self.share is None else "; every rank reads all of them"
            return f"the {unit} split across {ranks}{reading}{self._whole_batches(order)}"
        return f"already split across {ranks}"

    def _whole_batches(self, order: Any) -> str:
        """Return the addition to the phrase if the batches of a batch sampler are not divided; an empty string otherwise."""
        if not isinstance(order, OpaqueBatches) or not order.by_batch:
            return ""
        repeated = (
            "; the last round of an epoch may repeat batches"
            if order.share is not None and order.share.round_up
            else ""
        )
        return f", undivided because {type(order.sampler).__name__} forms its own batches{repeated}"

    def describe(self) -> str:
        """Return one line about the dataset, the order of the data, and how it is split across the ranks."""
        dataset, order = self.dataset, self._order
        kind = type(dataset).__name__
        if isinstance(dataset, IterableDataset):
            samples = length_of(dataset)
            what = f"stream {kind} " + ("of unknown length" if samples is None else f"of {samples:,} samples")
        else:
            samples = length_of(dataset)
            what = kind if samples is None else f"{samples:,} samples of {kind}"
            sampler = order.sampler if isinstance(order, OpaqueBatches | RankBatches) else order
            inner = sampler.sampler if forms_plain_batches(sampler) else sampler
            inner = inner.sampler if isinstance(inner, UnpaddedSampler) else inner
            what += f" in the order of {type(inner).__name__}"
        size = self.batch_size
        batches = "" if size is None else f", batches of {size}"
        limit = "" if self.limit is None else f", limited to {self.limit.describe(self._rounds)}"
        return f"{what}{batches}, {self.division}{limit}"

    def describe_copies(self, device: torch.device) -> str:
        """Return the addition to :meth:`describe` about copies to an accelerator; an empty string for other devices."""
        if not supports_pinned_memory(device):
            return ""
        if self.reads_ahead:
            return f"; each batch is copied to {device} while the previous one is processed"
        if self.loader.pin_memory:
            return f"; copied to {device} from pinned memory, but not ahead (see device_prefetch)"
        return f"; copies to {device} block, because pin_memory is False"

    @property
    def leftover(self) -> Any:
        """A batch from the last round of an epoch if other ranks had a batch in it and this rank did not; None otherwise."""
        return self._leftover

    @property
    def positioned(self) -> bool:
        """Whether the loader can start at any position without iterating to it."""
        return self._source is not None

    @property
    def resume_warning(self) -> str | None:
        """The reason that a run stopped within an epoch may not resume exactly; None if it resumes exactly."""
        dataset = self.dataset
        buffer = shuffle_buffer_of(dataset) if isinstance(dataset, Stateful) else None
        if self._stateful is not None and buffer is not None:
            return (
                f"{type(dataset).__name__} shuffles its samples in a buffer of {buffer:,}, which its state_dict does not "
                "contain: a run that resumes within an epoch skips some samples and repeats others. To resume exactly, use a "
                f"plain DataLoader instead of {type(self.loader).__name__}; it reads the samples of that epoch again."
            )
        if self._source is not None or self._stateful is not None:
            return None
        if not isinstance(dataset, IterableDataset):
            return (
                "The training data has a custom loader or sampler: a run that resumes within an epoch iterates over the "
                "batches that it has already seen, and is exact only if their order is the same each time. Use a built-in "
                "sampler, or a loader with state_dict and load_state_dict, to avoid this."
            )
        name = type(dataset).__name__
        if self.limit is not None and isinstance(dataset, Stateful):
            return (
                f"{self.limit} ends each epoch early, so the state_dict of {name} is not used: a run that resumes within an "
                "epoch rereads the samples that it has already seen, and is exact only if the stream is the same each time."
            )
        if buffer is not None:
            return (
                f"{name} shuffles its samples in a buffer of {buffer:,}, which its state_dict does not contain: a run that "
                "resumes within an epoch rereads the samples that it has already seen, and is exact if the shuffling has a seed."
            )
        if isinstance(dataset, Stateful) and self.loader.num_workers:
            return (
                f"{name} has state_dict, but with num_workers={self.loader.num_workers} each worker iterates over its own copy, "
                "whose state is not accessible: a run that resumes within an epoch rereads the samples that it has already "
                "seen. Use num_workers=0 or torchdata's StatefulDataLoader to resume exactly."
            )
        return (
            f"{name} is a stream without state_dict and load_state_dict: a run that resumes within an epoch rereads "
            "the samples that it has already seen, and is exact only if the stream is the same each time."
        )

    @property
    def resume_note(self) -> str | None:
        """The condition for an exact resume that only the user can know; None if there is none."""
        if self._source is not None or self._stateful is None or self.resume_warning is not None:
            return None
        kind = type(self.dataset if isinstance(self._stateful, ResumableStream) else self.loader).__name__
        return (
            f"The position in the training data is saved with {kind}.state_dict(). A run that resumes within an epoch is exact "
            "if that state includes everything that determines the next samples: order, buffers and random numbers."
        )

    def batches(self, epoch: int, done: int = 0) -> Iterator[Any]:
        """Iterate over an epoch, starting after its first ``done`` batches.

        Raises:
            TrainingError: during the iteration, if a data worker died, or data of unknown length ends before the limit.
        """
        limit = self.limit
        if limit is None:
            return self._all_batches(epoch, done)
        return limit.cut(self._all_batches(0 if limit.first_epoch else epoch, done), done, self._rounds)

    def _all_batches(self, epoch: int, done: int) -> Iterator[Any]:
        if isinstance(self.loader.worker_init_fn, WorkerInit):
            self.loader.worker_init_fn.prepare(epoch)
        set_epoch_of(self.loader.dataset, self._epoch_of(epoch))
        if self._source is not None and self._batches is not None:
            self._batches.set_requests(self._source.requests_from(self._epoch_of(epoch), self.consumed(epoch, done)))
            started = batches_in_process if can_load_in_process(self.loader) else start_workers
            return self._with_worker_errors(started(self.loader))
        if self._batches is not None and isinstance(self._batches.source, OpaqueBatches):
            self._batches.set_requests(self._batches.source.requests_from(epoch, done))
            return self._begin(epoch)
        self._set_epoch_of_parts(epoch)
        if self._stateful is not None:
            return self._from_state(self._stateful, epoch, done)
        return islice(self._begin(epoch), done, None)

    def second_pass(self, epoch: int) -> Iterator[Any]:
        """Iterate over a whole epoch without changing the position, the workers and the generators of this loader.

        Raises:
            StateError: if the loader has a custom order, whose state another iteration would change.
        """
        if self._source is None or self._batches is None:
            raise StateError("The data has a custom loader, sampler or stream, which cannot be read a second time.")
        loader = copy.copy(self.loader)
        generator = self.loader.generator
        changes = {
            "sampler" if self._batches.single else "batch_sampler": self._batches.copy(),
            "generator": None if generator is None else generator.clone_state(),
            "worker_init_fn": copy.copy(self.loader.worker_init_fn),
            "persistent_workers": False,
            "_iterator": None,
        }
        for name, value in changes.items():
            # DataLoader.__setattr__ raises an error.
            object.__setattr__(loader, name, value)
        second = EpochLoader(loader, world_size=self._world_size, seed=self._seed)
        second.limit = self.limit
        return second.batches(epoch)

    def indices_of(self, epoch: int, batch: int) -> list[Any]:
        """Return the dataset indices of the samples in one of this rank's batches; batches are counted from 0.

        Raises:
            StateError: if the loader has a custom order, which can only be found by iterating over it.
            ConfigValueError: if the batch is beyond the end of the epoch.
        """
        if self._source is None:
            raise StateError("The data has a custom loader or sampler, so the samples of a batch are unknown.")
        epoch = 0 if self._repeats_first_epoch else epoch
        if self.is_limited and batch >= (self.length or 0):
            raise ConfigValueError(f"Epoch {epoch} has no batch {batch}; it has {self.length}.")
        for request in self._source.requests_from(self._epoch_of(epoch), self.consumed(epoch, batch)):
            return list(request.indices)
        raise ConfigValueError(f"Epoch {epoch} has no batch {batch}; it has {self.length}.")

    # ---- the position, for checkpoints -----------------------------------------------------------------------------

    def consumed(self, epoch: int, batch: int) -> ConsumedSamples:
        """Return the data that all ranks together consumed before a batch: pairs (samples per batch, batches).

        It is independent of the number of ranks, so a run can resume with any number. An infinite order is counted from
        the start of the run.
        """
        if self._source is None:
            return ()
        if self._repeats_first_epoch:
            return advanced((), self._source.batch_size, batch * self._world_size)
        anchor = self._resume_point
        if self._source.endless:
            length = self.length or 0
            # An epoch during which the batch size changed may have more or fewer batches than others.
            since = max(length - anchor.batch, 0) + (epoch - anchor.epoch - 1) * length
            batches = batch - anchor.batch if epoch == anchor.epoch else since + batch
            return advanced(anchor.consumed, self._source.batch_size, batches * self._world_size)
        if epoch == anchor.epoch and batch >= anchor.batch:
            return advanced(anchor.consumed, self._source.batch_size, (batch - anchor.batch) * self._world_size)
        return advanced((), self._source.batch_size, batch * self._world_size)

    def resume_at(self, epoch: int, batch: int, consumed: Sequence[Sequence[int]]) -> int:
        """Resume at a saved position, possibly with a different number of ranks or batch size.

        Args:
            epoch: the current epoch.
            batch: the batch in the epoch, counted in batches of the saved run.
            consumed: the result of :meth:`consumed` in the saved run.

        Returns:
            The next batch in this loader's epoch, such that the remaining batches are exactly the data that was not
            consumed.
        """
        if self._source is None:
            return batch
        pairs = tuple((int(size), int(batches)) for size, batches in consumed)
        if not self._source.endless:
            batch = self._source.left() - self._source.left(epoch, pairs)
        if self._repeats_first_epoch:
            return batch
        self._resume_point = _ResumePoint(epoch, batch, pairs)
        return batch

    @property
    def is_stateful(self) -> bool:
        """Whether the loader or its dataset has a state dict, which belongs in checkpoints."""
        return self._stateful is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stateful loader or dataset after the last yielded batch.

        Raises:
            StateError: if neither is stateful.
        """
        if self._stateful is None:
            raise StateError("The data loader has no state_dict; its position is the result of consumed().")
        return self._stateful.state_dict() if self._saved_state is None else self._saved_state.state

    def load_state_dict(self, state: Mapping[str, Any], *, epoch: int, batch: int) -> None:
        """Make ``batches(epoch, batch)`` continue from a state.

        Raises:
            CheckpointMismatchError: if neither the loader nor its dataset is stateful.
        """
        if (
            self._stateful is None
            and isinstance(self.dataset, Stateful)
            and shuffle_buffer_of(self.dataset) is not None
        ):
            # An earlier version saved this state of a stream, without the samples in its shuffle buffer. Ignore it: the
            # position is sufficient.
            return
        if self._stateful is None:
            raise CheckpointMismatchError(
                "The checkpoint contains the state of a data loader, but the loader of this run has no load_state_dict. "
                "Resume with the data loader of the saved run."
            )
        self._saved_state = _LoaderState(epoch, batch, dict(state), restored=True)

    @property
    def _repeats_first_epoch(self) -> bool:
        return self.limit is not None and self.limit.first_epoch

    def _epoch_of(self, epoch: int) -> int:
        return 0 if self._source is not None and self._source.endless else epoch

    def _find_stateful(self) -> Stateful | None:
        """Return the stateful loader, or a stateful stream in the main process; None if there is neither."""
        if isinstance(self.loader, Stateful):
            return self.loader
        return self.loader.dataset if isinstance(self.loader.dataset, ResumableStream) else None

    def _set_epoch_of_parts(self, epoch: int) -> None:
        """Call ``set_epoch`` on the batch sampler and the sampler, if they have that method."""
        batch_sampler = self.loader.batch_sampler
        sampler = self.loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
        for part in (batch_sampler, sampler):
            setter = getattr(part, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def _from_state(self, stateful: Stateful, epoch: int, done: int) -> Iterator[Any]:
        """Yield the batches of a stateful loader; if the iteration is closed early, keep its state."""
        saved, self._saved_state = self._saved_state, None
        # A run that stopped after the last batch of an epoch starts the next epoch from the state after that batch.
        usable = saved is not None and (saved.restored or (saved.epoch, saved.batch) == (epoch, done))
        if saved is not None and usable:
            stateful.load_state_dict(saved.state)
        given = done
        batches = self._begin(epoch)
        try:
            for batch in islice(batches, 0 if usable else done, None):
                given += 1
                yield batch
            share = self._order.share if isinstance(self._order, OpaqueBatches) else self.share
            if given == 0 and (share is None or share.round_up):
                # The restored state was at the end of the previous epoch, so start a new one. Do not do this during
                # evaluation, where a rank may have no batch while other ranks do.
                batches = self._begin(epoch)
                for batch in batches:
                    given += 1
                    yield batch
        except GeneratorExit:
            self._saved_state = _LoaderState(epoch, given, stateful.state_dict(), restored=False)
            if given == self.length and iterates_its_sampler(self.loader):
                # The loop stops after the last batch, but torch's RandomSampler draws from its generator at its end.
                next(batches, None)
            raise

    def _begin(self, epoch: int) -> Iterator[Any]:
        """Start iterating over a custom loader without changing the state of the global generators."""
        # If every rank reads all the data, the random numbers must not depend on the rank.
        keys = (torch.initial_seed(), epoch, get_rank()) if self.share is None else (self._seed, epoch)
        if self.loader.generator is not None:
            batches = start_workers(self.loader)
        else:
            # Torch draws the workers' seed, and possibly the order, from the global generator. A run that resumes within an
            # epoch starts the iteration again, which would change the model's random numbers.
            with isolate_cpu_rng():
                seed_stream(*keys)
                batches = start_workers(self.loader)
        checked = self._with_worker_errors(batches)
        if self.share is None:
            return checked
        return self._divided(IsolatedIterator(checked, *keys, "batches"), self.share)

    def _divided(self, batches: Iterator[Any], share: RankShare) -> Iterator[Any]:
        """Yield this rank's batch from each round, which has one batch per rank. Every rank reads all batches."""
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
        """Return the number of batches that the loader itself yields per epoch; None if it has no length."""
        loader, dataset = self.loader, self.dataset
        if not isinstance(dataset, IterableDataset) or type(loader).__len__ is not DataLoader.__len__:
            return length_of(loader)
        # Do not call torch's __len__: afterwards, torch would warn when the workers' smaller last batches exceed that
        # length.
        samples, size = length_of(dataset), loader.batch_size
        if samples is None or size is None:
            return samples
        return samples // size if loader.drop_last else -(-samples // size)

    def _with_worker_errors(self, batches: Iterator[Any]) -> Iterator[Any]:
        with report_dead_workers(workers_of(batches)):
            yield from batches


def iterates_its_sampler(loader: DataLoader[Any]) -> bool:
    """Return whether the loader iterates over its (batch) sampler; a stream has none, and a custom ``__iter__`` may not."""
    if isinstance(loader.dataset, IterableDataset):
        return False
    iterates = type(loader).__iter__
    return iterates is DataLoader.__iter__ or iterates.__module__.partition(".")[0] == "torchdata"


def _keep_own(batches: Iterator[Any], share: RankShare) -> tuple[Any, Any, int]:
    """Read one round and return this rank's batch, the first batch, and the number of batches."""
    own = first = None
    count = 0
    for count, batch in enumerate(islice(batches, share.size), 1):
        first = batch if count == 1 else first
        own = batch if count == share.rank + 1 else own
    return own, first, count
