"""Samples drawn by weight."""

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
    """Samples in random order, each as often as its weight says, anew in every epoch.

    With replacement each place of an epoch is drawn for itself, so that samples may come several times or never; then
    each time has random numbers of its own. Without replacement a sample comes at most once, and those of higher weight
    tend to come first: the keys are those of Efraimidis and Spirakis (2006), "Weighted random sampling with a reservoir".

    Args:
        dataset: what is sampled.
        weights: for each sample, not negative, of any sum; or the name of the dataset's attribute or method that has them.
        num_samples: of an epoch over all ranks; as many as the dataset has where not given, or, without replacement, as
            have a weight above 0.
        replacement: see above.
        seed: of the drawing, the same on every rank; 0 where not given.
        round_up: see :class:`PositionedSampler`; so are ``rank`` and ``world_size``.

    Raises:
        ConfigValueError: if a weight is negative or not finite, all are 0, or more samples are wanted than there are.
        ConfigTypeError: if the weights are no sequence of numbers.
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
            raise ConfigValueError(f"WeightedSampler: num_samples is {num_samples}; at least 1 is due.")
        if not replacement and self._samples > available:
            raise ConfigValueError(
                f"WeightedSampler: {self._samples} samples are wanted without replacement, and {available} have a weight "
                "above 0. Ask for fewer, or allow replacement."
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
        places = torch.rand(self._samples, dtype=torch.float64, generator=generator).numpy() * ends[-1]
        # To the right: a sample without weight ends where the one before it does, and is passed over. A place that
        # rounding has put at the very end belongs to the last sample that has a weight.
        last = int(np.flatnonzero(self._weights)[-1])
        order: NDArray[np.int64] = np.minimum(np.searchsorted(ends, places, side="right"), last)
        return order

    def _without_replacement(self, generator: torch.Generator) -> NDArray[np.int64]:
        (weighted,) = np.nonzero(self._weights)
        uniform = torch.rand(len(self._weights), dtype=torch.float64, generator=generator).numpy()[weighted]
        # The smallest waiting times of independent exponential clocks, whose rates are the weights.
        waiting = -np.log1p(-uniform) / self._weights[weighted]
        order: NDArray[np.int64] = weighted[np.argsort(waiting, kind="stable")[: self._samples]]
        return order


def _checked(weights: NDArray[np.generic]) -> NDArray[np.float64]:
    try:
        numbers = weights.astype(np.float64)
    except ValueError as error:
        raise ConfigValueError(f"WeightedSampler: a weight is no number: {error}.") from error
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(bad):
        raise ConfigValueError(
            f"WeightedSampler: the weight of sample {bad[0]} is {numbers[bad[0]]}; a finite one of at least 0 is due."
        )
    if not numbers.any():
        raise ConfigValueError(f"WeightedSampler: none of the {len(numbers)} weights is above 0: nothing can be drawn.")
    return numbers
