"""Datasets with ``set_epoch`` receive the epoch, also in data workers that persist across epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, IterDataPipe, Subset

from stratagem.data import build_dataloader
from stratagem.errors import ConfigValueError

LOADING = [
    {},
    pytest.param({"num_workers": 2}, marks=pytest.mark.slow),
    pytest.param({"num_workers": 2, "persistent_workers": True}, marks=pytest.mark.slow),
]


class Stream(IterableDataset[Any]):
    """Four samples with the epoch and a random number."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(4):
            yield self.epoch, torch.rand(()).item()


class Table(Dataset[Any]):
    """Four samples with the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the following samples."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return self.epoch, index

    def __len__(self) -> int:
        return 4


DATASETS: dict[str, Callable[[], Any]] = {
    "stream": Stream,
    "chain of streams": lambda: ChainDataset([Stream(), Stream()]),
    "map-style": Table,
    "subset": lambda: Subset(Table(), [0, 2, 3]),
    "concatenated": lambda: ConcatDataset([Table(), Table()]),
}


@pytest.mark.parametrize("options", LOADING)
@pytest.mark.parametrize("name", DATASETS)
def test_every_epoch_reaches_the_dataset(name: str, options: dict[str, Any]) -> None:
    """The dataset receives the number of each epoch, also after a resume in epoch 3."""
    loader = build_dataloader(DataLoader(DATASETS[name](), batch_size=2, **options), seed=0, training=True)
    epochs = [{int(epoch) for batch in loader.batches(number) for epoch in batch[0]} for number in (0, 1, 3)]
    assert epochs == [{0}, {1}, {3}]


@pytest.mark.parametrize("sampler", [None, "InfiniteSampler"])
def test_each_epoch_is_passed_once(sampler: str | None) -> None:
    """Without workers, a dataset that prepares each epoch in ``set_epoch`` does so once; an endless order is a single epoch."""
    table, calls = Table(), list[int]()
    table.set_epoch = calls.append  # type: ignore[method-assign]
    cfg = {"dataset": table, "batch_size": 2, **({} if sampler is None else {"sampler": {"type": sampler}})}
    loader = build_dataloader(cfg, seed=0, training=True)
    for epoch in (0, 1):
        for _ in islice(loader.batches(epoch), 2):
            pass
    assert calls == ([0, 1] if sampler is None else [0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [Stream, lambda: ChainDataset([Stream()])])
def test_persistent_workers_draw_the_random_numbers_of_the_epoch(dataset: Callable[[], Any]) -> None:
    """Persistent workers draw the same numbers as workers that start with the epoch, as after a resume."""

    def numbers(*epochs: int, **options: Any) -> list[list[float]]:
        loader = build_dataloader({"dataset": dataset(), "num_workers": 2, **options}, seed=0, training=True)
        return [[batch[1].item() for batch in loader.batches(epoch)] for epoch in epochs]

    persistent = numbers(0, 1, 2, persistent_workers=True)
    assert persistent == numbers(0, 1, 2)
    assert persistent[2:] == numbers(2, persistent_workers=True)
    assert persistent[0] != persistent[1] != persistent[2]


class OwnLoader(DataLoader[Any]):
    """A user-defined loader, which cannot be rebuilt."""


@pytest.mark.parametrize("dataset", [Stream, Table, lambda: Subset(Table(), [0])])
def test_a_custom_loader_whose_workers_would_never_receive_an_epoch_is_refused(dataset: Callable[[], Any]) -> None:
    """The error suggests ``persistent_workers=False`` or a mapping; without persistent workers, the loader is accepted."""
    with pytest.raises(ConfigValueError, match=r"has set_epoch, .* this OwnLoader .* Set persistent_workers=False"):
        build_dataloader(OwnLoader(dataset(), num_workers=2, persistent_workers=True), seed=0, training=True)
    build_dataloader(OwnLoader(dataset(), num_workers=2), seed=0, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DataLoader, OwnLoader])
def test_a_shuffled_hugging_face_stream_has_a_different_order_in_each_epoch(kind: type[DataLoader[Any]]) -> None:
    """Hugging Face streams keep the epoch in shared memory, so persistent workers of any loader receive it."""

    def stream() -> Any:
        data = datasets.Dataset.from_dict({"x": list(range(32))}).to_iterable_dataset(num_shards=2)
        return data.shuffle(seed=3, buffer_size=8)

    def expected(epoch: int) -> list[int]:
        alone = stream()
        alone.set_epoch(epoch)
        return [int(each["x"]) for each in DataLoader(alone, batch_size=None, num_workers=1)]

    loader = kind(stream(), batch_size=None, num_workers=1, persistent_workers=True)
    built = build_dataloader(loader, seed=0, training=True)
    orders = [[int(each["x"]) for each in built.batches(epoch)] for epoch in (0, 1, 2)]
    assert orders == [expected(epoch) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 3


class Pipe(IterDataPipe[Any]):
    """A data pipe, which torch treats differently from other streams."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_data_pipes_are_not_wrapped() -> None:
    """Torch recognizes data pipes by their class to shuffle and shard them."""
    cfg = {"dataset": Pipe(), "num_workers": 1, "persistent_workers": True}
    assert isinstance(build_dataloader(cfg, seed=0, training=True).loader.dataset, IterDataPipe)
