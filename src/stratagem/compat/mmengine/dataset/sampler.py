"""Samplers that draw the samples in MMEngine's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sized
from typing import ClassVar

import torch
from torch.utils.data import Sampler

from stratagem.compat.mmengine.dist import get_dist_info, sync_random_seed
from stratagem.compat.mmengine.registry import DATA_SAMPLERS
from stratagem.errors import ConfigValueError

__all__ = ["DefaultSampler", "InfiniteSampler"]


@DATA_SAMPLERS.register_module()
class DefaultSampler(Sampler[int]):
    """Distribute the samples of each epoch among the ranks.

    Args:
        dataset: the dataset.
        shuffle: whether to shuffle the samples in each epoch.
        seed: the seed; by default, rank 0 draws one. Collective then.
        round_up: whether samples are repeated so that all ranks have the same number.
    """

    uses_global_generators: ClassVar[bool] = False

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, round_up: bool = True) -> None:
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.round_up = round_up
        length = len(dataset)
        self.num_samples = math.ceil((length if round_up else length - self.rank) / self.world_size)
        self.total_size = self.num_samples * self.world_size if round_up else length

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank in the current epoch."""
        length = len(self.dataset)
        indices = list(range(length))
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            indices = torch.randperm(length, generator=generator).tolist()
        repeated = itertools.islice(itertools.cycle(indices), self.total_size) if self.round_up else indices
        return itertools.islice(repeated, self.rank, self.total_size, self.world_size)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch


@DATA_SAMPLERS.register_module()
class InfiniteSampler(Sampler[int]):
    """Distribute an endless sequence of samples among the ranks; the samples are shuffled again when all were used.

    Args:
        dataset: the dataset.
        shuffle: whether to shuffle the samples.
        seed: the seed; by default, rank 0 draws one. Collective then.
    """

    uses_global_generators: ClassVar[bool] = False

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.size = len(dataset)
        self.indices = self._indices_of_rank()

    def _infinite_indices(self) -> Iterator[int]:
        """Yield the indices of all ranks."""
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist() if self.shuffle else range(self.size)

    def _indices_of_rank(self) -> Iterator[int]:
        """Yield the indices of this rank."""
        yield from itertools.islice(self._infinite_indices(), self.rank, None, self.world_size)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank, after those that were already used."""
        yield from self.indices

    def skip(self, num_samples: int) -> None:
        """Start from the beginning, after the first ``num_samples`` indices of this rank.

        Raises:
            ConfigValueError: if ``num_samples`` is negative.
        """
        if num_samples < 0:
            raise ConfigValueError(f"num_samples must not be negative, got {num_samples}.")
        self.indices = itertools.islice(self._indices_of_rank(), num_samples, None)

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order does not depend on the epoch."""
