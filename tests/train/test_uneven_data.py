"""Ranks with different numbers of training batches: an error on all ranks at once, or a common end of the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from stratagem.errors import ConfigError, TrainingError
from tests.support.ranks import Ranks
from tests.train.loader_kinds import run

# The numbers of samples on the two ranks; a batch has 2.
SIZES = (10, 6)
VALIDATION = torch.arange(4.0)


class Part(IterableDataset[Any]):
    """A stream with the samples of one rank; ranks have different numbers of samples."""

    def __init__(self, rank: int, num_replicas: int = 2) -> None:
        self.rank, self.num_replicas = rank, num_replicas

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(SIZES[self.rank]).float().unsqueeze(1) + 100 * self.rank)


class SizedPart(Part):
    """The same stream with a length."""

    def __len__(self) -> int:
        return SIZES[self.rank]


class PartSampler(Sampler[int]):
    """A sampler that yields the samples of one rank; ranks have different numbers of samples."""

    def __init__(self, rank: int, num_replicas: int = 2) -> None:
        self.rank, self.num_replicas = rank, num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZES[self.rank]))

    def __len__(self) -> int:
        return SIZES[self.rank]


class WrongLength(PartSampler):
    """A sampler with the same length but a different number of samples on each rank."""

    def __len__(self) -> int:
        return max(SIZES)


def data(kind: str, rank: int) -> Any:
    """Return the training data of a rank."""
    if kind == "stream":
        return DataLoader(Part(rank), batch_size=2)
    if kind == "stream with workers":
        return {"dataset": Part(rank), "batch_size": 2, "num_workers": 1}
    if kind == "stream on request":
        return {"dataset": Part(rank), "batch_size": 2, "device_prefetch": True}
    if kind == "sized stream":
        return DataLoader(SizedPart(rank), batch_size=2)
    samples = [torch.tensor([number + 100.0 * rank]) for number in range(max(SIZES))]
    sampler = PartSampler(rank) if kind == "sampler" else WrongLength(rank)
    return DataLoader(samples, batch_size=2, sampler=sampler)  # type: ignore[arg-type]


def train(folder: str, kinds: list[str], strategy: str, changes: dict[str, Any]) -> list[Any]:
    """Train on this rank with each kind of data; return the samples of each iteration or the error."""
    rank = torch.distributed.get_rank()
    results: list[Any] = []
    for number, kind in enumerate(kinds):
        try:
            batches, _ = run(f"{folder}/{number}", strategy, data(kind, rank), DataLoader(VALIDATION), **changes)
            results.append(batches)
        except (TrainingError, ConfigError) as error:
            results.append(str(error))
    return results


@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDPStrategy"])
def test_a_rank_that_runs_out_of_data_is_named_at_once_on_all_ranks(
    ranks: Ranks, tmp_path: Path, strategy: str
) -> None:
    """The error names the rank and its number of batches, and suggests a solution; no rank waits for the timeout."""
    kinds = ["stream", "stream with workers", "wrong length"]
    first, second = ranks.run(train, str(tmp_path), kinds, strategy, {})
    assert first == second
    expected = "Epoch 1: rank 1 ran out of training data after 3 batches, but rank 0 has more."
    for error in first:
        assert error.startswith(expected), error
        assert "uneven_data='shortest'" in error


def test_different_lengths_are_an_error_before_training(ranks: Ranks, tmp_path: Path) -> None:
    """If the data has a length on all ranks, an error shows the lengths before the first iteration."""
    for results in ranks.run(train, str(tmp_path), ["sized stream", "sampler"], "DDPStrategy", {}):
        for error in results:
            assert "different numbers of training batches per epoch (rank 0: 5, rank 1: 3)" in error


KINDS = ["stream", "stream with workers", "sized stream", "sampler", "wrong length"]
ENDS = {"max_epochs": 2, "uneven_data": "shortest"}


@pytest.mark.parametrize("train_cfg", [ENDS, {"max_iters": 6, "uneven_data": "shortest"}])
def test_an_epoch_can_end_with_the_shortest_rank(ranks: Ranks, tmp_path: Path, train_cfg: dict[str, Any]) -> None:
    """With a common end of the epoch, both ranks train on three batches per epoch."""
    first, second = ranks.run(train, str(tmp_path), KINDS, "DDPStrategy", {"train_cfg": train_cfg})
    epoch = [[0, 1], [2, 3], [4, 5]]
    for kind, one, other in zip(KINDS, first, second, strict=True):
        assert one == epoch * 2, kind
        assert other == [[number + 100 for number in batch] for batch in epoch] * 2, kind


def test_an_unknown_policy_is_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """The error for an invalid value suggests the closest valid one."""
    changes = {"train_cfg": {"max_epochs": 1, "uneven_data": "shortst"}}
    for (error,) in ranks.run(train, str(tmp_path), ["stream"], "DDPStrategy", changes):
        assert "uneven_data='shortst'. Did you mean 'shortest'?" in error
