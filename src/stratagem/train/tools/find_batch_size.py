"""Find the largest batch by trying, and leave the training as it was."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, cast, final

import torch
from torch.utils.data import IterableDataset

from stratagem.data import EpochLoader, epoch_order
from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.model import Trainable
from stratagem.strategies import BaseStrategy
from stratagem.train.tools.preserve_state import preserve_training_state

__all__ = ["BatchSearch", "BatchTrial", "find_batch_size"]

# Without an accelerator there is no out-of-memory error to search for.
_CPU_LIMIT = 1024
_WARM_UP = 2
_ROUNDS = 3
# What is as good as the highest throughput.
_GOOD = 0.9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTrial:
    """A batch size that was tried.

    Attributes:
        batch_size: samples of an iteration.
        seconds: the time of an iteration without loading of data; None where memory was not enough.
        memory: the most bytes that tensors took on the accelerator; None without one.
    """

    batch_size: int
    seconds: float | None
    memory: int | None = None

    @property
    def throughput(self) -> float:
        """Samples in a second; 0 where memory was not enough."""
        return 0.0 if self.seconds is None else self.batch_size / self.seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSearch:
    """What a search for the largest batch saw.

    Attributes:
        trials: by batch size, rising.
        limit: the largest size that was to be tried.
        largest: the largest that fits; None where not even the smallest did.
        knee: the smallest size with nine tenths of the highest throughput; None where nothing fits.
    """

    trials: tuple[BatchTrial, ...]
    limit: int
    largest: int | None
    knee: int | None

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was what ended the search, and not the limit."""
        return any(trial.seconds is None for trial in self.trials)


def find_batch_size(
    strategy: BaseStrategy, dataloader: EpochLoader, *, limit: int | None = None, steps: int = 3
) -> BatchSearch:
    """Double the batch until memory is not enough, close in on the largest that fits, and time each.

    Memory errors are reliable on accelerators only. On the CPU the operating system swaps, or ends the process, before
    there is one, so the search ends at ``limit`` and the throughput is what it can tell. Weights, optimizer and
    generators are left as they were.

    Args:
        strategy: prepared with a model and an optimizer, in one process.
        dataloader: gives the dataset and how samples become a batch.
        limit: the largest size to try; by default 1,024 on the CPU and none on accelerators. It is never more than the
            dataset has.
        steps: iterations of each of the three timings of which the shortest counts, at least one window of the optimizer.

    Raises:
        PlacementError: in several processes, where one that has no memory left would leave the others waiting.
        ConfigValueError: if a number is not positive, the dataset is empty, or the loader does not batch by a size.
        ConfigTypeError: if the dataset cannot be asked for single samples.
    """
    if strategy.world_size > 1:
        raise PlacementError(
            f"The batch size is searched for in one process, and there are {strategy.world_size}. It is that of a rank."
        )
    for name, value in {"limit": limit, "steps": steps}.items():
        if value is not None and value < 1:
            raise ConfigValueError(f"{name} is {value!r}; a whole number of at least 1 is due.")
    on_cpu = strategy.world.device.type == "cpu"
    limit = _CPU_LIMIT if limit is None and on_cpu else limit
    limit = _available(dataloader, limit)
    window = max(wrapper.accumulative_counts for wrapper in strategy.optim_wrapper.each().values())
    trials: dict[int, BatchTrial] = {}

    def fits(size: int) -> bool:
        trials[size] = _try(strategy, _batch(dataloader, size, strategy.seed), size, max(steps, window))
        return trials[size].seconds is not None

    with preserve_training_state(strategy, dataloader):
        strategy.model.train()
        largest = _largest(fits, limit)
    best = max((trial.throughput for trial in trials.values()), default=0.0)
    good = [size for size, trial in trials.items() if trial.seconds is not None and trial.throughput >= _GOOD * best]
    return BatchSearch(
        trials=tuple(trials[size] for size in sorted(trials)),
        limit=limit,
        largest=largest or None,
        knee=min(good, default=None),
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to ``limit`` that fits, 0 where none does: doubling, then bisection."""
    low, size = 0, 1
    while fits(size):
        if size == limit:
            return limit
        low, size = size, min(2 * size, limit)
    high = size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _available(dataloader: EpochLoader, limit: int | None) -> int:
    """Return how many samples a batch may have."""
    if dataloader.batch_size is None:
        raise ConfigValueError("The dataloader does not make batches of a size, so there is none to search for.")
    try:
        length = len(dataloader.dataset)
    except TypeError:
        if limit is None:
            raise ConfigValueError("The data has no length: give limit, the largest batch to try.") from None
        return limit
    if length == 0:
        raise ConfigValueError("The dataset is empty.")
    return length if limit is None else min(limit, length)


def _batch(dataloader: EpochLoader, size: int, seed: int) -> Any:
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        samples = list(islice(iter(dataset), size))
    elif hasattr(dataset, "__getitem__"):
        order = epoch_order(len(dataset), seed=seed, epoch=0, shuffle=True)
        samples = [dataset[index] for index in order[:size]]
    else:
        raise ConfigTypeError(f"{type(dataset).__name__} gives no single samples, so no batch can be made of them.")
    return samples if dataloader.collate is None else dataloader.collate(samples)


def _try(strategy: BaseStrategy, batch: Any, size: int, steps: int) -> BatchTrial:
    step, optim = cast("Trainable", strategy.model).train_step, strategy.optim_wrapper
    accelerator = strategy.world.device.type != "cpu"
    try:
        if accelerator:
            torch.accelerator.reset_peak_memory_stats()
        # The first steps allocate the optimizer's state, choose kernels and compile.
        for _ in range(max(_WARM_UP, steps)):
            step(batch, optim_wrapper=optim)
        times = [_now(accelerator=accelerator)]
        for _ in range(_ROUNDS):
            for _ in range(steps):
                step(batch, optim_wrapper=optim)
            times.append(_now(accelerator=accelerator))
        # The shortest is the one that other processes disturbed least.
        seconds = min(later - earlier for earlier, later in pairwise(times)) / steps
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        seconds = None
    memory = torch.accelerator.max_memory_allocated() if accelerator else None
    if seconds is None:
        optim.discard_accumulation()
        optim.zero_grad()
        gc.collect()
        if accelerator:
            torch.accelerator.empty_cache()
    return BatchTrial(batch_size=size, seconds=seconds, memory=memory)


def _now(*, accelerator: bool) -> float:
    if accelerator:
        torch.accelerator.synchronize()
    return time.perf_counter()


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no class of its own for the CPU's allocator.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
