"""The order of data, over ranks, epochs and restarts."""

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
    """Cut an order into batches, the last one of which may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


@given(lengths, sizes, seeds, epochs, st.booleans())
def test_each_sample_comes_exactly_once_an_epoch(length: int, size: int, seed: int, epoch: int, shuffle: bool) -> None:
    """Over all ranks, an epoch that is not filled up has every sample once."""
    ranks = samplers(length, size, seed=seed, epoch=epoch, shuffle=shuffle, round_up=False)
    assert Counter(index for sampler in ranks for index in sampler) == Counter(range(length))


@given(st.integers(1, 40), sizes, seeds)
def test_filling_up_gives_every_rank_as_many(length: int, size: int, seed: int) -> None:
    """Training needs as many samples on every rank; those added are the first of the same order."""
    ranks = [list(sampler) for sampler in samplers(length, size, seed=seed, round_up=True)]
    each = math.ceil(length / size)
    assert [len(order) for order in ranks] == [each] * size
    (whole,) = (list(sampler) for sampler in samplers(length, 1, seed=seed))
    filled = [index for turn in zip(*ranks, strict=True) for index in turn]
    # More ranks than samples go around more than once.
    assert filled == (whole * size)[: each * size]


@given(lengths, sizes, st.booleans())
def test_the_length_is_what_a_rank_yields(length: int, size: int, round_up: bool) -> None:
    """A progress bar that trusts the length ends where the data does."""
    for sampler in samplers(length, size, round_up=round_up):
        assert len(sampler) == len(list(sampler))
        assert sampler.samples == length


@given(st.integers(1, 40), sizes, st.integers(1, 4), seeds, epochs)
def test_the_ranks_batches_make_the_batch_of_one_process(
    length: int, size: int, batch: int, seed: int, epoch: int
) -> None:
    """The k-th batches of n ranks hold the samples of one process's k-th batch that is n times as large."""
    (whole,) = samplers(length, 1, seed=seed, epoch=epoch)
    ranks = samplers(length, size, seed=seed, epoch=epoch, round_up=False)
    together = [
        sorted(index for sampler in ranks for index in list(sampler)[start : start + batch])
        for start in range(0, math.ceil(length / size), batch)
    ]
    assert together == [sorted(part) for part in batches(list(whole), size * batch)]


@given(lengths, sizes, seeds, st.booleans(), st.data())
def test_starting_anywhere_gives_the_rest(
    length: int, size: int, seed: int, round_up: bool, data: st.DataObject
) -> None:
    """A run that stopped goes on with the next sample, also with another number of ranks, who get as many each."""
    (whole,) = samplers(length, 1, seed=seed, epoch=3)
    order = list(whole)
    ranks = samplers(length, size, seed=seed, epoch=3, round_up=round_up)
    start = data.draw(st.integers(0, length + size))
    rest = [list(sampler.dealt(3, start)) for sampler in ranks]
    wanted = order[start:]
    missing = -len(wanted) % size if round_up and wanted else 0
    filled = wanted + (order * size)[:missing]
    assert rest == [filled[rank::size] for rank in range(size)]
    assert [sampler.left(start) for sampler in ranks] == [len(one) for one in rest]


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated() -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1: repeating an experiment with the next seed is another experiment."""
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch, shuffle=True)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_streams_are_named_by_all_their_keys() -> None:
    """Keys do not run together, and their order counts; a seed fits where NumPy takes one."""
    keys = [(1, 23), (12, 3), (3, 12), (1, 2, 3), (123,)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= stream_seed(number) < 2**32 for number in range(100))


def test_an_order_is_the_same_everywhere_and_always() -> None:
    """The order hangs on seed, epoch and length alone: not on what was drawn before, nor on how often it is asked."""
    first = epoch_order(50, seed=3, epoch=7, shuffle=True)
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.get_rng_state()
    assert epoch_order(50, seed=3, epoch=7, shuffle=True) == first
    assert torch.equal(torch.get_rng_state(), before), "the model's random numbers are not touched"
    assert sorted(first) == list(range(50))
    assert first != list(range(50))


def test_without_shuffling_every_epoch_is_in_order() -> None:
    """Evaluation sees the samples as the dataset has them."""
    for epoch in (0, 1):
        assert [list(sampler) for sampler in samplers(5, 2, epoch=epoch, shuffle=False)] == [[0, 2, 4], [1, 3, 0]]


def test_a_rank_beyond_the_samples_has_none() -> None:
    """More ranks than samples, not filled up: the last ones have nothing to do."""
    ranks = [list(sampler) for sampler in samplers(2, 3, shuffle=False, round_up=False)]
    assert ranks == [[0], [1], []]


def test_without_a_group_a_sampler_is_for_one_process() -> None:
    """Rank and number of ranks are those of the process group where they are not given."""
    assert sorted(DefaultSampler(range(5))) == [0, 1, 2, 3, 4]
    assert sorted(islice(InfiniteSampler(range(5)), 5)) == [0, 1, 2, 3, 4]


@given(st.integers(1, 20), sizes, seeds, st.booleans(), st.integers(0, 50))
def test_infinite_orders_are_the_epochs_one_after_the_other(
    length: int, size: int, seed: int, shuffle: bool, start: int
) -> None:
    """The ranks take the sequence of all passes in turn, from anywhere on, also across the ends of passes."""
    passes = [
        index
        for epoch in range((start + 30 * size) // length + 1)
        for index in epoch_order(length, seed=seed, epoch=epoch, shuffle=shuffle)
    ]
    for rank in range(size):
        sampler = InfiniteSampler(range(length), shuffle, seed, rank=rank, world_size=size)
        sampler.set_epoch(5)
        assert list(islice(sampler.dealt(0, start), 30)) == passes[start + rank :: size][:30]


def test_an_infinite_order_can_be_begun_again() -> None:
    """Each iteration starts at the beginning, and the length is that of one pass."""
    sampler = InfiniteSampler(range(4), shuffle=False)
    assert list(islice(sampler.dealt(0, 6), 3)) == [2, 3, 0]
    assert list(islice(sampler, 3)) == list(islice(sampler, 3)) == [0, 1, 2]
    assert len(sampler) == 4
    assert sampler.endless
    assert not DefaultSampler(range(4)).endless


def test_an_infinite_order_of_nothing_is_refused() -> None:
    """An empty dataset would be asked for ever."""
    with pytest.raises(ConfigValueError, match="dataset is empty"):
        InfiniteSampler([])
