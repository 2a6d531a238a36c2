"""The micro-batches of a model without a strategy, of any number of samples, with few simulations of the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from stratagem.planning.batch import BatchSpec
from stratagem.planning.failures import describe_failure
from stratagem.planning.repeated_blocks import BlockFinder, RepeatedBlocks, extended_changes
from stratagem.planning.simulate import Job
from stratagem.planning.timeline import Timeline, interpolated, record_timeline, resized, sizes_of

__all__ = ["Timelines"]

_NO_BATCH: Final = "Without a batch, no step was simulated."
# The numbers of blocks from which the micro-batch of the whole model follows.
_FEW_BLOCKS: Final = (2, 3)


@final
@dataclass(frozen=True, slots=True)
class Timelines:
    """The micro-batches of a model, which do not depend on the strategy and the number of ranks.

    Attributes:
        job: what is planned.
        batch: the batch; None if there is none.
        finder: finds the equal blocks of the model.
        dtype: the dtype of the micro-batch that shows whether all blocks behave equally; best the one that engines need.
    """

    job: Job
    batch: BatchSpec | None
    finder: BlockFinder
    dtype: torch.dtype | None = None
    _known: dict[Any, Timeline | str] = field(default_factory=dict)
    _float_buffers: list[bool] = field(default_factory=list)
    # Whether micro-batches with more samples follow from two others; missing if no one has been compared.
    _linear: dict[Any, bool] = field(default_factory=dict)
    # Whether micro-batches of the whole model follow from those with a few blocks.
    _regular: dict[Any, bool] = field(default_factory=dict)

    def get(
        self, dtype: torch.dtype | None, *, keeps_buffers: bool, tp_size: int = 1, size: int | None = None
    ) -> Timeline | str:
        """Return a micro-batch, or why it cannot be simulated.

        Args:
            dtype: the dtype that the engine casts the model to.
            keeps_buffers: whether buffers keep their dtype.
            tp_size: the number of ranks that the layers of ``tp_plan`` are sharded across.
            size: the number of samples; by default that of the batch.
        """
        if self.batch is None:
            return _NO_BATCH
        options = self._options(dtype, keeps_buffers=keeps_buffers, tp_size=tp_size)
        if size is None or self.batch.size is None:
            return self._recorded(self.batch.size, options)
        # The smaller of the two sizes from which the search for the largest micro-batch starts.
        first = max(2, self.batch.size)
        if size < first or size == self.batch.size:
            return self._recorded(size, options)
        own = self._recorded(self.batch.size, options)
        low = own if self.batch.size == first or isinstance(own, str) else self._larger(first, own, options)
        if size == first:
            return low
        if isinstance(low, str):
            return low
        high = self._larger(2 * first, low, options)
        if size == 2 * first or isinstance(high, str):
            return high if size == 2 * first else self._recorded(size, options)
        key = tuple(options.values())
        expected = interpolated(low, high, (size - first) / first) if self._linear.get(key, True) else None
        if expected is not None and key in self._linear:
            return expected
        real = self._larger(size, low, options)
        self._linear[key] = expected == real
        return real

    def repeated_blocks(self) -> RepeatedBlocks | None:
        """Return the equal blocks of the model; None if there are none, or if a micro-batch shows that they differ."""
        if self.batch is None:
            return None
        blocks = self.finder.find()
        options = self._options(self.dtype, keeps_buffers=True, tp_size=1)
        return blocks if blocks is not None and self._is_regular(blocks, self.batch.size, options) else None

    def _options(self, dtype: torch.dtype | None, *, keeps_buffers: bool, tp_size: int) -> dict[str, Any]:
        keeps_buffers = keeps_buffers and dtype is not None and self._has_float_buffers()
        return {"dtype": dtype, "keeps_buffers": keeps_buffers, "tp_size": tp_size}

    def _larger(self, size: int, low: Timeline, options: dict[str, Any]) -> Timeline | str:
        """Return a micro-batch with more samples than another one: from a few blocks, if that is known to be correct."""
        blocks = self.finder.find()
        key = (*options.values(), size)
        if key not in self._known and blocks is not None and self._is_regular(blocks, low.samples, options):
            short, long = (self._recorded(size, options, (blocks, keep)) for keep in _FEW_BLOCKS)
            if isinstance(short, Timeline) and isinstance(long, Timeline):
                times = blocks.count - _FEW_BLOCKS[1]
                changes = extended_changes(sizes_of(short), sizes_of(long), times)
                whole = None if changes is None else resized(low, changes, short, long, times)
                if whole is not None:
                    self._known[key] = whole
        return self._recorded(size, options)

    def _is_regular(self, blocks: RepeatedBlocks, size: int | None, options: dict[str, Any]) -> bool:
        """Return whether the micro-batch of the whole model is equal to the one that follows from a few blocks."""
        key = (*options.values(), size)
        if key not in self._regular:
            found = [self._recorded(size, options, part) for part in (*((blocks, keep) for keep in _FEW_BLOCKS), None)]
            short, long, whole = ([] if isinstance(each, str) else sizes_of(each) for each in found)
            self._regular[key] = extended_changes(short, long, blocks.count - _FEW_BLOCKS[1]) == whole
        return self._regular[key]

    def _recorded(
        self, size: int | None, options: dict[str, Any], part: tuple[RepeatedBlocks, int] | None = None
    ) -> Timeline | str:
        """Return a simulated micro-batch of the model, or of one with only some of its blocks."""
        batch = self.batch
        if batch is None:
            return _NO_BATCH
        key = (*options.values(), size) if part is None else (*options.values(), size, part[1])
        if key not in self._known:
            try:
                own = batch.batch if size == batch.size else batch.resized(size or 1)
                job = self.job if part is None else self.finder.shortened(*part)
                self._known[key] = record_timeline(job, own, samples=size, **options)
            except Exception as error:  # noqa: BLE001 -- the user's model may raise anything
                self._known[key] = describe_failure(error, "the model")
        return self._known[key]

    def _has_float_buffers(self) -> bool:
        if not self._float_buffers:
            self._float_buffers.append(any(each.is_floating_point() for each in self.job.make_model().buffers()))
        return self._float_buffers[0]
