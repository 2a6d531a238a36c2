"""A sampler that draws samples by weight."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from stratagem.data.sample_values import per_sample_values
from stratagem.data.samplers import PositionedSampler
from stratagem.data.streams import stream_seed
from stratagem.errors import ConfigValueError

__all__ = ["WeightedSampler"]


@final
class WeightedSampler(PositionedSampler):
    """Draw samples in random order with probabilities proportional to their weights, independently in every epoch.

    With replacement, each position of an epoch is drawn independently: a sample may occur several times, with different
    random numbers each time, or not at all. Without replacement, a sample occurs at most once, and samples with higher
    weights tend to come first (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir").

    Args:
        dataset: the dataset.
        weights: one nonnegative weight per sample, with any sum; or the name of a dataset attribute or method.
        num_samples: the number of samples per epoch over all ranks; by default the size of the dataset or, without
            replacement, the number of samples with a positive weight.
        replacement: whether to draw with replacement.
        seed: the random seed, the same on every rank; 0 by default.
        round_up: see :class:`PositionedSampler`, also for ``rank`` and ``world_size``.

    Raises:
        ConfigValueError: if a weight is negative, NaN or infinite, all weights are 0, or ``num_samples`` is too large.
        ConfigTypeError: if the weights are not a sequence of numbers.
    """

    def __init__(
        self,
        dataset: Sized,
        weights: Sequence[float] | str,
        num_samples: int | None = None,
        replacement: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(round_up=round_up, rank=rank, world_size=world_size)
        self._weights = _checked(per_sample_values(weights, dataset, "weights"))
        available = len(self._weights) if replacement else int(np.count_nonzero(self._weights))
        self._samples = available if num_samples is None else num_samples
        if self._samples < 1:
            raise ConfigValueError(f"WeightedSampler: num_samples is {num_samples}; it must be at least 1.")
        if not replacement and self._samples > available:
            raise ConfigValueError(
                f"WeightedSampler: cannot draw {self._samples} samples without replacement, because only {available} have a "
                "positive weight. Reduce num_samples or set replacement=True."
            )
        self.repeats = replacement
        self._seed = seed or 0

    @property
    def samples(self) -> int:
        return self._samples

    def order(self, epoch: int) -> list[int]:
        draw = self._with_replacement if self.repeats else self._without_replacement
        order: list[int] = draw(torch.Generator().manual_seed(stream_seed(self._seed, epoch))).tolist()
        return order

    def _with_replacement(self, generator: torch.Generator) -> NDArray[np.int64]:
        ends = np.cumsum(self._weights)
        positions = torch.rand(self._samples, dtype=torch.float64, generator=generator).numpy() * ends[-1]
        # side="right" skips samples with weight 0, whose interval is empty. A position that is rounded up to the end of the
        # range belongs to the last sample with a positive weight.
        last = int(np.flatnonzero(self._weights)[-1])
        order: NDArray[np.int64] = np.minimum(np.searchsorted(ends, positions, side="right"), last)
        return order

    def _without_replacement(self, generator: torch.Generator) -> NDArray[np.int64]:
        (weighted,) = np.nonzero(self._weights)
        uniform = torch.rand(len(self._weights), dtype=torch.float64, generator=generator).numpy()[weighted]
        # Select the smallest of independent exponential variables whose rates are the weights.
        waiting = -np.log1p(-uniform) / self._weights[weighted]
        order: NDArray[np.int64] = weighted[np.argsort(waiting, kind="stable")[: self._samples]]
        return order


def _checked(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    try:
        numbers = weights.astype(np.float64)
    except ValueError as error:
        raise ConfigValueError(f"WeightedSampler: a weight is not a number: {error}.") from error
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(bad):
        raise ConfigValueError(
            f"WeightedSampler: the weight of sample {bad[0]} is {numbers[bad[0]]}; it must be finite and nonnegative."
        )
    if not numbers.any():
        raise ConfigValueError(f"WeightedSampler: all {len(numbers)} weights are 0.")
    return numbers
