"""Batches that are loaded in the main process equal those of torch's iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stratagem.data import build_dataloader
from stratagem.data.in_process import batches_in_process, can_load_in_process


class Squares(Dataset[int]):
    """The squares of the numbers below ten."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index**2


class AtOnce(Squares):
    """A dataset that loads whole batches, which differ from its samples."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [-(index**2) for index in indices]


class NotAtOnce(Squares):
    """A dataset whose ``__getitems__`` is disabled."""

    __getitems__ = None


class Stream(IterableDataset[int]):
    """A stream of numbers."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 3},
    {"batch_size": 3, "drop_last": True},
    {"batch_size": None},
    {"batch_size": 4, "shuffle": True},
    {"batch_size": 4, "collate_fn": tuple},
    {"batch_sampler": [[1, 2], [5]]},
]


@pytest.mark.parametrize("dataset", [Squares, AtOnce, NotAtOnce])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_batches_are_those_of_torch(dataset: type[Squares], options: dict[str, Any]) -> None:
    """Two epochs have the same batches and leave the generator of the loader in the same state."""
    ours, theirs = (DataLoader(dataset(), generator=torch.Generator().manual_seed(3), **options) for _ in range(2))
    assert can_load_in_process(ours)
    for _ in range(2):
        expected = [str(batch) for batch in theirs]
        assert [str(batch) for batch in batches_in_process(ours)] == expected
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())  # type: ignore[union-attr]


def test_other_loaders_are_left_to_torch() -> None:
    """Subclasses, workers, streams and pinned memory need torch's iterator."""

    class Own(DataLoader[int]):
        pass

    assert not can_load_in_process(Own(Squares()))
    assert not can_load_in_process(DataLoader(Squares(), num_workers=1))
    assert not can_load_in_process(DataLoader(Stream()))
    assert not can_load_in_process(DataLoader(Squares(), pin_memory=True))


def test_the_profiler_records_the_loading_of_each_batch() -> None:
    """An active profiler finds the record of torch's iterator, once for each batch."""
    loader = build_dataloader({"dataset": Squares(), "batch_size": 5}, seed=0, training=True)
    with torch.profiler.profile() as profile:
        assert len(list(loader.batches(0))) == 2
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"] == 2


def test_an_error_in_a_dataset_is_raised_unchanged() -> None:
    """The exception of a sample is not wrapped."""

    class Failing(Squares):
        def __getitem__(self, index: int) -> int:
            raise LookupError(f"sample {index}")

    loader = build_dataloader({"dataset": Failing(), "batch_size": 5, "shuffle": False}, seed=0, training=True)
    with pytest.raises(LookupError, match="sample 0"):
        list(loader.batches(0))
