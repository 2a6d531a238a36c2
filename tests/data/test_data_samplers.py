"""The order of samples over ranks, epochs and restarts."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratagem.data import DefaultSampler, InfiniteSampler, epoch_order, stream_seed
from stratagem.errors import ConfigValueError

lengths = st.integers(0, 40)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)


def samplers(length: int, size: int, *, seed: int = 0, epoch: int = 0, **options: bool) -> list[DefaultSampler]:
    """Return the sampler of each rank."""
    made = [DefaultSampler(range(length), seed=seed, rank=rank, world_size=size, **options) for rank in range(size)]
    for sampler in made:
        sampler.set_epoch(epoch)
    return made


def batches(order: list[int], size: int) -> list[list[int]]:
    """Split an order into batches, the last of which may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


@given(lengths, sizes, seeds, epochs, st.booleans())
def test_each_sample_occurs_exactly_once_per_epoch(
    length: int, size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    """Without padding, an epoch over all ranks contains every sample once."""
    ranks = samplers(length, size, seed=seed, epoch=epoch, shuffle=shuffle, round_up=False)
    assert Counter(index for sampler in ranks for index in sampler) == Counter(range(length))


@given(st.integers(1, 40), sizes, seeds)
def test_padding_gives_every_rank_the_same_number(length: int, size: int, seed: int) -> None:
    """In training, all ranks have the same number of samples; padding repeats the first of the order."""
    ranks = [list(sampler) for sampler in samplers(length, size, seed=seed, round_up=True)]
    each = math.ceil(length / size)
    assert [len(order) for order in ranks] == [each] * size
    (whole,) = (list(sampler) for sampler in samplers(length, 1, seed=seed))
    filled = [index for turn in zip(*ranks, strict=True) for index in turn]
    # If there are more ranks than samples, the order is repeated more than once.
    assert filled == (whole * size)[: each * size]


@given(lengths, sizes, st.booleans())
def test_the_length_matches_the_iteration(length: int, size: int, round_up: bool) -> None:
    """The length of a sampler is the number of its indices."""
    for sampler in samplers(length, size, round_up=round_up):
        assert len(sampler) == len(list(sampler))
        assert sampler.samples == length


@given(st.integers(1, 40), sizes, st.integers(1, 4), seeds, epochs)
def test_the_batches_of_all_ranks_form_the_batch_of_one_process(
    length: int, size: int, batch: int, seed: int, epoch: int
) -> None:
    """The k-th batches of n ranks contain the samples of the k-th batch of one process with n times the batch size."""
    (whole,) = samplers(length, 1, seed=seed, epoch=epoch)
    ranks = samplers(length, size, seed=seed, epoch=epoch, round_up=False)
    together = [
        sorted(index for sampler in ranks for index in list(sampler)[start : start + batch])
        for start in range(0, math.ceil(length / size), batch)
    ]
    assert together == [sorted(part) for part in batches(list(whole), size * batch)]


@given(lengths, sizes, seeds, st.booleans(), st.data())
def test_an_epoch_can_be_resumed_at_any_sample(
    length: int, size: int, seed: int, round_up: bool, data: st.DataObject
) -> None:
    """An epoch can be resumed at any sample and with any number of ranks, all with the same number of samples."""
    (whole,) = samplers(length, 1, seed=seed, epoch=3)
    order = list(whole)
    ranks = samplers(length, size, seed=seed, epoch=3, round_up=round_up)
    start = data.draw(st.integers(0, length + size))
    rest = [list(sampler.rank_indices(3, start)) for sampler in ranks]
    wanted = order[start:]
    missing = -len(wanted) % size if round_up and wanted else 0
    filled = wanted + (order * size)[:missing]
    assert rest == [filled[rank::size] for rank in range(size)]
    assert [sampler.left(start) for sampler in ranks] == [len(one) for one in rest]


def test_orders_of_adjacent_seeds_and_epochs_differ() -> None:
    """Epoch 1 of seed 0 has a different order than epoch 0 of seed 1."""
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch, shuffle=True)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_stream_seeds_depend_on_all_keys() -> None:
    """Seeds of streams depend on all keys and their order, and are valid for NumPy."""
    keys = [(1, 23), (12, 3), (3, 12), (1, 2, 3), (123,)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= stream_seed(number) < 2**32 for number in range(100))


def test_an_order_is_reproducible() -> None:
    """The order depends only on the seed, the epoch and the length, not on earlier random numbers."""
    first = epoch_order(50, seed=3, epoch=7, shuffle=True)
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.get_rng_state()
    assert epoch_order(50, seed=3, epoch=7, shuffle=True) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not advance"
    assert sorted(first) == list(range(50))
    assert first != list(range(50))


def test_without_shuffling_every_epoch_is_in_order() -> None:
    """Without shuffling, every epoch has the order of the dataset."""
    for epoch in (0, 1):
        assert [list(sampler) for sampler in samplers(5, 2, epoch=epoch, shuffle=False)] == [[0, 2, 4], [1, 3, 0]]


def test_a_rank_beyond_the_samples_has_none() -> None:
    """Without padding, ranks beyond the number of samples have none."""
    ranks = [list(sampler) for sampler in samplers(2, 3, shuffle=False, round_up=False)]
    assert ranks == [[0], [1], []]


def test_without_a_group_a_sampler_is_for_one_process() -> None:
    """Without a process group, the default is a single rank."""
    assert sorted(DefaultSampler(range(5))) == [0, 1, 2, 3, 4]
    assert sorted(islice(InfiniteSampler(range(5)), 5)) == [0, 1, 2, 3, 4]


@given(st.integers(1, 20), sizes, seeds, st.booleans(), st.integers(0, 50))
def test_infinite_orders_are_consecutive_epochs(length: int, size: int, seed: int, shuffle: bool, start: int) -> None:
    """The ranks take the sequence of all passes in turn, from any position."""
    passes = [
        index
        for epoch in range((start + 30 * size) // length + 1)
        for index in epoch_order(length, seed=seed, epoch=epoch, shuffle=shuffle)
    ]
    for rank in range(size):
        sampler = InfiniteSampler(range(length), shuffle, seed, rank=rank, world_size=size)
        sampler.set_epoch(5)
        assert list(islice(sampler.rank_indices(0, start), 30)) == passes[start + rank :: size][:30]


def test_an_infinite_order_can_be_restarted() -> None:
    """Each iteration starts at the beginning, and the length is that of one pass."""
    sampler = InfiniteSampler(range(4), shuffle=False)
    assert list(islice(sampler.rank_indices(0, 6), 3)) == [2, 3, 0]
    assert list(islice(sampler, 3)) == list(islice(sampler, 3)) == [0, 1, 2]
    assert len(sampler) == 4
    assert sampler.endless
    assert not DefaultSampler(range(4)).endless


def test_an_infinite_order_of_an_empty_dataset_is_rejected() -> None:
    """An empty dataset raises an error."""
    with pytest.raises(ConfigValueError, match="dataset is empty"):
        InfiniteSampler([])
