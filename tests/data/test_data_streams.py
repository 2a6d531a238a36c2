"""The random numbers of a sample depend neither on the process that loads it nor on the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

from stratagem.data import EpochLoader, build_dataloader
from stratagem.data.streams import uses_random_numbers

WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]
Drawn = tuple[int, float, float, float, float]


class Augmented(Dataset):
    """Twelve samples with their index and a number from each generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Drawn:
        return (index, random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(())))


class AtOnce(Augmented):
    """A dataset that loads whole batches with random numbers."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float]]:
        return list(zip(indices, torch.rand(len(indices)).tolist(), strict=True))


def mixed(samples: list[Drawn]) -> list[tuple[Any, ...]]:
    """Add a random number of the whole batch to each sample, as mixup does."""
    share = float(np.random.rand())
    return [(*sample, share) for sample in samples]


def build(dataset: Any = None, *, rank: int = 0, ranks: int = 1, seed: int = 3, **options: Any) -> EpochLoader:
    """Build a loader of augmented samples in batches of two."""
    cfg = {"dataset": dataset or Augmented(), "batch_size": 2, "collate_fn": list, **options}
    return build_dataloader(cfg, seed=seed, rank=rank, world_size=ranks, training=True)


def samples_of(loader: EpochLoader, epoch: int = 0, done: int = 0) -> dict[Any, Any]:
    """Return each sample of an epoch by its index."""
    return {sample[0]: sample for batch in loader.batches(epoch, done) for sample in batch}


@pytest.mark.slow
def test_a_sample_does_not_depend_on_how_it_is_loaded() -> None:
    """A sample has the same bits for any number of workers and ranks, any batch size, and after a resume."""
    whole = samples_of(build(), 4)
    assert len({sample[1:] for sample in whole.values()}) == 12
    for workers in (1, 2):
        assert samples_of(build(num_workers=workers), 4) == whole
    assert samples_of(build(num_workers=2, batch_size=5), 4) == whole
    assert samples_of(build(rank=0, ranks=2), 4) | samples_of(build(rank=1, ranks=2, num_workers=1), 4) == whole
    rest = samples_of(build(num_workers=2), 4, done=4)
    assert len(rest) == 4
    assert rest.items() <= whole.items()


def test_epochs_and_seeds_have_different_random_numbers() -> None:
    """Each epoch and seed has different random numbers, which are reproducible."""
    loader = build()
    first, second = samples_of(loader, 0), samples_of(loader, 1)
    assert not {sample[1:] for sample in first.values()} & {sample[1:] for sample in second.values()}
    assert samples_of(loader, 0) == first
    assert not {s[1:] for s in samples_of(build(seed=4)).values()} & {s[1:] for s in first.values()}


def test_the_generators_produce_unrelated_numbers() -> None:
    """NumPy and torch get different seeds, because equal seeds would give equal numbers."""
    for _, python, numpy, _, torchs in samples_of(build()).values():
        # A torch float32 has 24 bits, all of which would be equal.
        assert abs(python - numpy) > 1e-6
        assert abs(numpy - torchs) > 1e-6


@pytest.mark.slow
def test_persistent_workers_augment_each_epoch_differently() -> None:
    """With ``persistent_workers``, each epoch has different random numbers."""
    loader = build(num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 0):
        assert samples_of(loader, epoch) == samples_of(build(), epoch)


@pytest.mark.parametrize("workers", WORKERS)
def test_random_numbers_in_a_collate_function_are_reproducible(workers: int) -> None:
    """The random numbers of a collate function do not depend on workers and are reproducible after a restart."""
    whole = list(build(collate_fn=mixed).batches(2))
    assert len({batch[0][-1] for batch in whole}) == 6
    assert list(build(collate_fn=mixed, num_workers=workers).batches(2, 3)) == whole[3:]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_dataset_that_loads_whole_batches_is_reproducible(workers: int) -> None:
    """The random numbers of ``__getitems__`` depend on the samples of the batch."""
    whole = list(build(AtOnce()).batches(1))
    assert len({draw for batch in whole for _, draw in batch}) == 12
    assert list(build(AtOnce(), num_workers=workers).batches(1, 2)) == whole[2:]
    assert [batch[0][1] for batch in build(AtOnce()).batches(0)] != [batch[0][1] for batch in whole]


def test_a_subset_has_random_numbers_for_each_sample() -> None:
    """A subset, whose ``__getitems__`` loads single samples, has random numbers for each sample."""
    part = Subset(Augmented(), range(4, 10))
    assert samples_of(build(part, batch_size=5)) == samples_of(build(part, batch_size=2))


@pytest.mark.parametrize("workers", WORKERS)
def test_samples_without_batches_are_the_same(workers: int) -> None:
    """With ``batch_size=None``, samples have the same random numbers as in batches."""
    single = build_dataloader(
        {"dataset": Augmented(), "batch_size": None, "num_workers": workers}, seed=3, training=True
    )
    assert {sample[0]: tuple(sample) for sample in single.batches(4)} == samples_of(build(), 4)


def test_a_repeated_sample_has_different_random_numbers() -> None:
    """If a sample occurs several times in an epoch, its random numbers differ, on any number of ranks."""
    sampler = {"type": "WeightedSampler", "weights": [1.0] + [0.0] * 11, "num_samples": 6}
    batches = list(build(sampler=sampler).batches(0))
    assert len({sample[1] for batch in batches for sample in batch}) == 6
    ranks = [
        [sample for batch in build(sampler=sampler, rank=r, ranks=2).batches(0) for sample in batch] for r in (0, 1)
    ]
    together = [sample for pair in zip(*ranks, strict=True) for sample in pair]
    assert together == [sample for batch in batches for sample in batch]

    endless = build(sampler={"type": "InfiniteSampler"}, batch_size=12).batches(0)
    passes = [{sample[0]: sample[1] for sample in next(endless)} for _ in range(2)]
    assert not set(passes[0].values()) & set(passes[1].values())


def test_loading_does_not_affect_the_global_generators() -> None:
    """Loading does not affect the global generators, and the model does not affect the data."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()
    whole = samples_of(build(collate_fn=mixed))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == states[1:]
    other = {}
    for batch in build(collate_fn=mixed).batches(0):
        other |= {sample[0]: sample for sample in batch}
        _ = torch.rand(7), np.random.rand(7), random.random()
    assert other == whole


class Failing(Augmented):
    """A dataset that draws random numbers and then fails."""

    def __getitem__(self, index: int) -> Drawn:
        raise OSError(super().__getitem__(index))


def test_the_generators_are_restored_after_an_error() -> None:
    """The generators are restored if loading fails."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(OSError, match="0."):
        next(build(Failing()).batches(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


class OfWorker(Augmented):
    """A dataset whose samples are set by a worker function."""

    name = ""

    def __getitem__(self, index: int) -> Any:
        return self.name


def name_worker(worker: int) -> None:
    """Set an attribute of the worker's dataset, and seed the generator, which must have no effect."""
    get_worker_info().dataset.name = f"worker {worker}"
    torch.manual_seed(worker)


@pytest.mark.slow
def test_a_custom_worker_function_can_access_the_dataset() -> None:
    """A custom worker function receives the worker ID and can access the dataset; its seed has no effect."""
    loader = build(OfWorker(), num_workers=2, worker_init_fn=name_worker)
    assert list(loader.batches(0))[:2] == [["worker 0", "worker 0"], ["worker 1", "worker 1"]]
    assert samples_of(build(num_workers=2, worker_init_fn=name_worker)) == samples_of(build())


class Stream(IterableDataset):
    """A stream with one number from each generator, optionally distributed for two ranks."""

    def __init__(self, rank: int | None = None) -> None:
        if rank is not None:
            self.rank, self.num_replicas = rank, 2

    def __iter__(self) -> Iterator[tuple[float, float, float]]:
        yield random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.slow
def test_workers_of_a_stream_have_different_random_numbers() -> None:
    """Random numbers depend on the seed, epoch, rank and worker, and are reproducible."""
    found = {}
    for seed, rank, epoch in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        loader = build(Stream(rank), seed=seed, rank=rank, ranks=2, num_workers=2)
        for worker, batch in enumerate(loader.batches(epoch)):
            found[seed, rank, epoch, worker] = batch[0]
    assert len({draw for requests_from in found.values() for draw in requests_from}) == 24
    again = build(Stream(1), seed=0, rank=1, ranks=2, num_workers=2)
    assert [batch[0] for batch in again.batches(0)] == [found[0, 1, 0, 0], found[0, 1, 0, 1]]


@pytest.mark.slow
def test_a_stream_read_by_every_rank_has_the_same_random_numbers() -> None:
    """A stream that every rank reads in full has the same random numbers on all ranks."""
    both = [[batch[0] for batch in build(Stream(), rank=rank, ranks=2, num_workers=2).batches(0)] for rank in (0, 1)]
    alone = [batch[0] for batch in build(Stream(), num_workers=2).batches(0)]
    assert both == [[alone[0]], [alone[1]]]


def test_only_built_in_datasets_are_known_to_use_no_random_numbers() -> None:
    """Built-in tensor datasets need no seeding; custom datasets may use random numbers at any time."""
    rows = TensorDataset(torch.zeros(3))
    for dataset in (rows, [1], (1,), range(3), torch.zeros(3), np.zeros(3), Subset(rows, [0]), ConcatDataset([rows])):
        assert not uses_random_numbers(dataset, None)
    assert not uses_random_numbers(StackDataset(rows, rows), torch.utils.data.default_collate)
    assert not uses_random_numbers(StackDataset(x=rows), None)
    for dataset in (
        Augmented(),
        Subset(Augmented(), [0]),
        ConcatDataset([rows, Augmented()]),
        StackDataset(x=Augmented()),
    ):
        assert uses_random_numbers(dataset, None)
    assert uses_random_numbers(rows, mixed)
