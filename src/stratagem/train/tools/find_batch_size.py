"""Find the largest batch size that fits into memory."""

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
# A batch size is good if it reaches this fraction of the highest throughput.
_GOOD = 0.9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTrial:
    """The measurement of one batch size.

    Attributes:
        batch_size: the number of samples per iteration.
        seconds: the duration of an iteration without data loading; None if the trial ran out of memory.
        memory: the peak memory of tensors on the accelerator in bytes; None on the CPU.
    """

    batch_size: int
    seconds: float | None
    memory: int | None = None

    @property
    def throughput(self) -> float:
        """Samples per second; 0 if the trial ran out of memory."""
        return 0.0 if self.seconds is None else self.batch_size / self.seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSearch:
    """The result of a search for the largest batch size.

    Attributes:
        trials: the measurements in ascending order of the batch size.
        limit: the largest batch size that may be tried.
        largest: the largest batch size that fits; None if none does.
        knee: the smallest batch size with at least 90 % of the highest throughput; None if none fits.
    """

    trials: tuple[BatchTrial, ...]
    limit: int
    largest: int | None
    knee: int | None

    @property
    def out_of_memory(self) -> bool:
        """Whether memory, rather than the limit, ended the search."""
        return any(trial.seconds is None for trial in self.trials)


def find_batch_size(
    strategy: BaseStrategy, dataloader: EpochLoader, *, limit: int | None = None, steps: int = 3
) -> BatchSearch:
    """Double the batch size until memory is exhausted, search for the largest one that fits, and time each trial.

    Out-of-memory errors are only reliable on accelerators. On the CPU, the operating system swaps or kills the process
    first, so the search stops at ``limit`` and only measures the throughput. Weights, optimizer and random states are
    restored afterwards.

    Args:
        strategy: prepared with a model and an optimizer, in a single process.
        dataloader: provides the dataset and the collate function.
        limit: the largest batch size to try; by default 1,024 on the CPU, and unlimited on accelerators. The size of the
            dataset is always a limit.
        steps: the number of iterations in each of the three timings, at least one accumulation window. The fastest timing is
            used.

    Raises:
        PlacementError: if there are several processes: a rank that runs out of memory would block the other ranks.
        ConfigValueError: if a number is not positive, the dataset is empty, or the dataloader has no batch size.
        ConfigTypeError: if single samples of the dataset cannot be accessed.
    """
    if strategy.world_size > 1:
        raise PlacementError(
            f"The search for the batch size needs a single process, but there are {strategy.world_size}. The result is the "
            "batch size of one rank."
        )
    for name, value in {"limit": limit, "steps": steps}.items():
        if value is not None and value < 1:
            raise ConfigValueError(f"Expected {name} to be an integer >= 1, got {value!r}.")
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
    """Return the largest number up to ``limit`` that fits, or 0 if none does, by doubling and then bisection."""
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
    """Return the maximum batch size."""
    if dataloader.batch_size is None:
        raise ConfigValueError(
            "The dataloader has no batch size that the search could change. Configure it with a batch_size."
        )
    try:
        length = len(dataloader.dataset)
    except TypeError:
        if limit is None:
            raise ConfigValueError("The dataset has no length: set limit, the largest batch size to try.") from None
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
        raise ConfigTypeError(
            f"{type(dataset).__name__} does not provide access to single samples, so no batch can be created."
        )
    return samples if dataloader.collate is None else dataloader.collate(samples)


def _try(strategy: BaseStrategy, batch: Any, size: int, steps: int) -> BatchTrial:
    step, optim = cast("Trainable", strategy.model).train_step, strategy.optim_wrapper
    accelerator = strategy.world.device.type != "cpu"
    try:
        if accelerator:
            torch.accelerator.reset_peak_memory_stats()
        # Warm-up: the first steps allocate the optimizer state, select kernels and compile.
        for _ in range(max(_WARM_UP, steps)):
            step(batch, optim_wrapper=optim)
        times = [_now(accelerator=accelerator)]
        for _ in range(_ROUNDS):
            for _ in range(steps):
                step(batch, optim_wrapper=optim)
            times.append(_now(accelerator=accelerator))
        # The shortest time is the least disturbed by other processes.
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
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
