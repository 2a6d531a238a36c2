"""Random numbers of the data: the same for a sample whoever loads it, and none of the model's."""

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
from stratagem.data.streams import draws_numbers

WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]
Drawn = tuple[int, float, float, float, float]


class Augmented(Dataset):
    """Twelve samples: their number, and what the generators give while they are loaded."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Drawn:
        return (index, random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(())))


class AtOnce(Augmented):
    """Loads a batch at once, with draws for all of it."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float]]:
        return list(zip(indices, torch.rand(len(indices)).tolist(), strict=True))


def mixed(samples: list[Drawn]) -> list[tuple[Any, ...]]:
    """Add a draw for the whole batch to each sample, as mixing does."""
    share = float(np.random.rand())
    return [(*sample, share) for sample in samples]


def build(dataset: Any = None, *, rank: int = 0, ranks: int = 1, seed: int = 3, **options: Any) -> EpochLoader:
    """Build a loader of augmented samples in batches of two."""
    cfg = {"dataset": dataset or Augmented(), "batch_size": 2, "collate_fn": list, **options}
    return build_dataloader(cfg, seed=seed, rank=rank, world_size=ranks, training=True)


def drawn(loader: EpochLoader, epoch: int = 0, done: int = 0) -> dict[Any, Any]:
    """Return each sample of an epoch by its number."""
    return {sample[0]: sample for batch in loader.batches(epoch, done) for sample in batch}


@pytest.mark.slow
def test_a_sample_is_the_same_bit_for_bit_whoever_loads_it() -> None:
    """In the main process, by one or two workers, by any rank, in batches of any size, from the middle of the epoch on."""
    whole = drawn(build(), 4)
    assert len({sample[1:] for sample in whole.values()}) == 12
    for workers in (1, 2):
        assert drawn(build(num_workers=workers), 4) == whole
    assert drawn(build(num_workers=2, batch_size=5), 4) == whole
    assert drawn(build(rank=0, ranks=2), 4) | drawn(build(rank=1, ranks=2, num_workers=1), 4) == whole
    rest = drawn(build(num_workers=2), 4, done=4)
    assert len(rest) == 4
    assert rest.items() <= whole.items()


def test_epochs_and_seeds_have_draws_of_their_own() -> None:
    """Each epoch augments anew, and again the same when it is repeated."""
    loader = build()
    first, second = drawn(loader, 0), drawn(loader, 1)
    assert not {sample[1:] for sample in first.values()} & {sample[1:] for sample in second.values()}
    assert drawn(loader, 0) == first
    assert not {s[1:] for s in drawn(build(seed=4)).values()} & {s[1:] for s in first.values()}


def test_the_generators_draw_unrelated_numbers() -> None:
    """NumPy and torch make equal numbers of an equal seed, so they do not get one."""
    for _, python, numpy, _, torchs in drawn(build()).values():
        # A float32 of torch has 24 bits; equal ones would agree in all of them.
        assert abs(python - numpy) > 1e-6
        assert abs(numpy - torchs) > 1e-6


@pytest.mark.slow
def test_workers_that_stay_augment_each_epoch_anew() -> None:
    """``persistent_workers`` start once, and still each epoch has its own draws."""
    loader = build(num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 0):
        assert drawn(loader, epoch) == drawn(build(), epoch)


@pytest.mark.parametrize("workers", WORKERS)
def test_what_a_collate_function_draws_belongs_to_its_batch(workers: int) -> None:
    """Mixing of a batch's samples is the same with and without workers, and after a restart."""
    whole = list(build(collate_fn=mixed).batches(2))
    assert len({batch[0][-1] for batch in whole}) == 6
    assert list(build(collate_fn=mixed, num_workers=workers).batches(2, 3)) == whole[3:]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_dataset_that_loads_batches_at_once_draws_the_same_for_the_same_batch(workers: int) -> None:
    """``__getitems__`` is asked for the batch, and its draws depend on which samples that has."""
    whole = list(build(AtOnce()).batches(1))
    assert len({draw for batch in whole for _, draw in batch}) == 12
    assert list(build(AtOnce(), num_workers=workers).batches(1, 2)) == whole[2:]
    assert [batch[0][1] for batch in build(AtOnce()).batches(0)] != [batch[0][1] for batch in whole]


def test_a_subset_draws_for_each_sample() -> None:
    """A part of a dataset has torch's ``__getitems__``, which loads one sample after the other all the same."""
    part = Subset(Augmented(), range(4, 10))
    assert drawn(build(part, batch_size=5)) == drawn(build(part, batch_size=2))


@pytest.mark.parametrize("workers", WORKERS)
def test_without_batches_a_sample_draws_the_same(workers: int) -> None:
    """``batch_size=None`` loads single samples, with the draws that they have in a batch."""
    single = build_dataloader(
        {"dataset": Augmented(), "batch_size": None, "num_workers": workers}, seed=3, training=True
    )
    assert {sample[0]: tuple(sample) for sample in single.batches(4)} == drawn(build(), 4)


def test_a_sample_that_comes_again_in_an_epoch_draws_anew() -> None:
    """Drawn with replacement or without end, each time has its own augmentation, on any ranks."""
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


def test_the_main_process_s_generators_are_left_alone() -> None:
    """Dropout draws what it would draw without the data, and the data what it draws without dropout."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()
    whole = drawn(build(collate_fn=mixed))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == states[1:]
    other = {}
    for batch in build(collate_fn=mixed).batches(0):
        other |= {sample[0]: sample for sample in batch}
        _ = torch.rand(7), np.random.rand(7), random.random()
    assert other == whole


class Failing(Augmented):
    """Draws, and then fails."""

    def __getitem__(self, index: int) -> Drawn:
        raise OSError(super().__getitem__(index))


def test_the_generators_are_given_back_where_loading_fails() -> None:
    """What catches the error and goes on draws as if nothing had been loaded."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(OSError, match="0."):
        next(build(Failing()).batches(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


class OfWorker(Augmented):
    """Gives what a function for workers has set."""

    name = ""

    def __getitem__(self, index: int) -> Any:
        return self.name


def name_worker(worker: int) -> None:
    """Set something on the worker's dataset, as those do that open files, and seed in vain."""
    get_worker_info().dataset.name = f"worker {worker}"
    torch.manual_seed(worker)


@pytest.mark.slow
def test_a_worker_function_of_one_s_own_finds_the_dataset() -> None:
    """It is called with the worker's number, and sees the dataset as it was given; its seeding changes no sample."""
    loader = build(OfWorker(), num_workers=2, worker_init_fn=name_worker)
    assert list(loader.batches(0))[:2] == [["worker 0", "worker 0"], ["worker 1", "worker 1"]]
    assert drawn(build(num_workers=2, worker_init_fn=name_worker)) == drawn(build())


class Stream(IterableDataset):
    """One draw of each generator, for each of two ranks if it is given one."""

    def __init__(self, rank: int | None = None) -> None:
        if rank is not None:
            self.rank, self.num_replicas = rank, 2

    def __iter__(self) -> Iterator[tuple[float, float, float]]:
        yield random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.slow
def test_the_workers_of_a_stream_have_streams_of_their_own() -> None:
    """Seed, epoch, rank and worker each give others, and equal ones the same."""
    found = {}
    for seed, rank, epoch in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        loader = build(Stream(rank), seed=seed, rank=rank, ranks=2, num_workers=2)
        for worker, batch in enumerate(loader.batches(epoch)):
            found[seed, rank, epoch, worker] = batch[0]
    assert len({draw for draws in found.values() for draw in draws}) == 24
    again = build(Stream(1), seed=0, rank=1, ranks=2, num_workers=2)
    assert [batch[0] for batch in again.batches(0)] == [found[0, 1, 0, 0], found[0, 1, 0, 1]]


@pytest.mark.slow
def test_a_stream_that_every_rank_reads_draws_the_same_on_all() -> None:
    """Each rank keeps its own of the two workers' batches, which are those of one process."""
    both = [[batch[0] for batch in build(Stream(), rank=rank, ranks=2, num_workers=2).batches(0)] for rank in (0, 1)]
    alone = [batch[0] for batch in build(Stream(), num_workers=2).batches(0)]
    assert both == [[alone[0]], [alone[1]]]


def test_only_what_torch_has_ready_is_known_not_to_draw() -> None:
    """Tensors need no seeding, which costs more than taking a row of them; a dataset of one's own may draw anytime."""
    rows = TensorDataset(torch.zeros(3))
    for dataset in (rows, [1], (1,), range(3), torch.zeros(3), np.zeros(3), Subset(rows, [0]), ConcatDataset([rows])):
        assert not draws_numbers(dataset, None)
    assert not draws_numbers(StackDataset(rows, rows), torch.utils.data.default_collate)
    assert not draws_numbers(StackDataset(x=rows), None)
    for dataset in (
        Augmented(),
        Subset(Augmented(), [0]),
        ConcatDataset([rows, Augmented()]),
        StackDataset(x=Augmented()),
    ):
        assert draws_numbers(dataset, None)
    assert draws_numbers(rows, mixed)
