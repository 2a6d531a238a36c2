"""Each sample once an epoch, whatever happens on the way: the positions alone, and real loaders with workers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from stratagem.data import EpochLoader, build_dataloader, epoch_order

SEED, EPOCH = 5, 3


@dataclass(frozen=True)
class Piece:
    """A start of the run: how many ranks and workers, samples of a batch, and batches until it is stopped."""

    ranks: int
    batch: int
    stop: int
    workers: int = 0


class Numbers(Dataset):
    """Sample i is i, so batches tell which samples they have."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index

    @property
    def remainders(self) -> list[int]:
        """A group of three for each sample."""
        return [index % 3 for index in range(self.length)]


def loaders(length: int, piece: Piece, **options: Any) -> list[EpochLoader]:
    """Return each rank's loader."""
    cfg = {"dataset": Numbers(length), "batch_size": piece.batch, "num_workers": piece.workers, **options}
    return [
        build_dataloader(cfg, seed=SEED, rank=rank, world_size=piece.ranks, training=True)
        for rank in range(piece.ranks)
    ]


Read = Callable[[EpochLoader, int, int], list[Sequence[int]]]


def told(loader: EpochLoader, first: int, count: int) -> list[Sequence[int]]:
    """Return the samples of batches without loading them."""
    return [loader.indices_of(EPOCH, batch) for batch in range(first, first + count)]


def loaded(loader: EpochLoader, first: int, count: int) -> list[Sequence[int]]:
    """Load the batches."""
    batches = loader.batches(EPOCH, first)
    return [next(batches) for _ in range(count)]


def train(length: int, pieces: list[Piece], read: Read = told, **options: Any) -> list[list[list[Sequence[int]]]]:
    """Go through an epoch in pieces, the last one to its end; return of each step of each piece the ranks' batches."""
    batch, taken = 0, ()
    steps = []
    for number, piece in enumerate(pieces):
        ranks = loaders(length, piece, **options)
        starts = {loader.go_on(EPOCH, batch, taken) for loader in ranks}
        assert len(starts) == 1, "ranks stand at the same batch"
        (batch,) = starts
        total = ranks[0].length
        assert total is not None
        left = total - batch
        count = left if number == len(pieces) - 1 else min(piece.stop, left)
        steps.append(list(map(list, zip(*(read(loader, batch, count) for loader in ranks), strict=True))))
        batch += count
        (saved,) = {loader.taken(EPOCH, batch) for loader in ranks}
        # A checkpoint holds it as JSON.
        taken = json.loads(json.dumps(saved))
    return steps


def in_global_order(step: list[Sequence[int]]) -> list[int]:
    """Return a step's samples in the order in which they were dealt to the ranks."""
    longest = max(map(len, step))
    return [batch[place] for place in range(longest) for batch in step if place < len(batch)]


lengths = st.integers(1, 60)
restarts = st.lists(st.builds(Piece, st.integers(1, 5), st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=1500, deadline=None)
@given(lengths, restarts, st.booleans(), st.booleans())
def test_any_restarts_with_any_ranks_and_batches_give_each_sample_once_in_the_same_order(
    length: int, pieces: list[Piece], shuffle: bool, drop_last: bool
) -> None:
    """The pieces put together are the epoch's one global order; only its end is filled up or, if asked, left out."""
    order = epoch_order(length, seed=SEED, epoch=EPOCH, shuffle=shuffle)
    steps = [step for piece in train(length, pieces, shuffle=shuffle, drop_last=drop_last) for step in piece]
    seen = [index for step in steps for index in in_global_order(step)]
    assert seen[:length] == order[: len(seen)]
    if drop_last:
        last = pieces[-1]
        assert length - len(seen) < last.batch * last.ranks
    else:
        assert len(seen) >= length
    # Filled up, so that every rank has as many, by fewer samples than there are ranks.
    assert len(seen) - length < max(piece.ranks for piece in pieces)
    assert all(len({len(batch) for batch in step}) == 1 for step in steps)


@settings(max_examples=700, deadline=None)
@given(lengths, restarts, st.booleans(), st.booleans())
def test_batches_of_one_group_give_each_sample_once_over_any_restarts(
    length: int, pieces: list[Piece], shuffle: bool, drop_last: bool
) -> None:
    """Also where the batch size changes inside of the epoch, which cuts what is left anew."""
    sampler = {"type": "GroupedBatchSampler", "groups": "remainders", "drop_last": drop_last}
    steps = train(length, pieces, batch_sampler=sampler, shuffle=shuffle)
    batches = [batch for piece in steps for step in piece for batch in step]
    assert all(len({index % 3 for index in batch}) == 1 for batch in batches)
    # The last step alone may be filled up, behind its first rank's batch, by batches from the beginning. What drop_last left
    # out of it comes after all, where smaller batches are taken then.
    last = [piece[-1] for piece in steps if piece]
    filled = last if drop_last else last[-1:]
    ends = [batch for step in filled for batch in step[1:]]
    counts = Counter(index for batch in batches for index in batch)
    counts.subtract(Counter(index for batch in ends for index in batch))
    assert not counts or max(counts.values()) == 1
    if not drop_last:
        assert {index for batch in batches for index in batch} == set(range(length))


@settings(max_examples=150, deadline=None)
@given(lengths, restarts)
def test_batches_of_one_group_keep_their_order_where_only_the_ranks_change(length: int, pieces: list[Piece]) -> None:
    """The ranks take the same batches in turn, however many they are."""
    size = pieces[0].batch
    pieces = [Piece(piece.ranks, size, piece.stop) for piece in pieces]
    sampler = {"type": "GroupedBatchSampler", "groups": "remainders"}
    (whole,) = train(length, [Piece(1, size, 0)], batch_sampler=sampler)
    steps = train(length, pieces, batch_sampler=sampler)
    batches = [batch for piece in steps for step in piece for batch in step]
    assert batches[: len(whole)] == [step[0] for step in whole]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), restarts)
def test_a_weighted_order_goes_on_over_any_restarts(length: int, pieces: list[Piece]) -> None:
    """Drawn with replacement, the epoch is the same sequence of draws in pieces."""
    sampler = {"type": "WeightedSampler", "weights": [1 + index % 4 for index in range(length)], "num_samples": 40}
    (whole,) = train(length, [Piece(1, 1, 0)], sampler=sampler)
    steps = [step for piece in train(length, pieces, sampler=sampler) for step in piece]
    seen = [index for step in steps for index in in_global_order(step)]
    assert seen[:40] == [step[0][0] for step in whole]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20), restarts)
def test_data_without_end_goes_on_over_any_restarts(length: int, pieces: list[Piece]) -> None:
    """Pass after pass follows in one sequence, whoever takes it."""
    seen: list[int] = []
    batch, taken = 0, ()
    for piece in pieces:
        ranks = loaders(length, piece, sampler={"type": "InfiniteSampler"})
        for loader in ranks:
            assert loader.go_on(0, batch, taken) == batch
        for number in range(batch, batch + piece.stop):
            seen += in_global_order([loader.indices_of(0, number) for loader in ranks])
        batch += piece.stop
        taken = ranks[0].taken(0, batch)
    passes = range(math.ceil(len(seen) / length))
    sequence = [index for number in passes for index in epoch_order(length, seed=SEED, epoch=number, shuffle=True)]
    assert seen == sequence[: len(seen)]


def test_epochs_of_data_without_end_follow_each_other_after_a_change_of_the_batch_size() -> None:
    """An epoch that was resumed with batches of another size ends where the next one begins."""
    small = loaders(10, Piece(1, 2, 0), sampler={"type": "InfiniteSampler", "shuffle": False})[0]
    large = loaders(10, Piece(1, 5, 0), sampler={"type": "InfiniteSampler", "shuffle": False})[0]
    # Epoch 1 has five batches of two; after one of them 12 samples are done, the last of which is sample 1.
    assert large.go_on(1, 1, small.taken(1, 1)) == 1
    assert [large.indices_of(1, 1), large.indices_of(2, 0), large.indices_of(2, 1)] == [
        [2, 3, 4, 5, 6],
        [7, 8, 9, 0, 1],
        [2, 3, 4, 5, 6],
    ]
    assert large.taken(2, 0) == ((2, 6), (5, 1))


def test_an_epoch_that_others_have_completed_has_nothing_left() -> None:
    """Seven ranks fill five samples up to seven, so one rank finds more taken than there are."""
    (one,) = loaders(5, Piece(1, 2, 0))
    assert one.go_on(EPOCH, 1, [[1, 7]]) == one.length == 3
    assert list(one.batches(EPOCH, 3)) == []


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True])
def test_real_workers_give_each_sample_once_over_restarts(drop_last: bool) -> None:
    """Two workers, none, then one, with other ranks and batches each time: what is loaded is what is told."""
    pieces = [Piece(2, 3, 2, workers=2), Piece(1, 4, 2), Piece(3, 1, 1, workers=1), Piece(2, 2, 0)]
    options = {"drop_last": drop_last, "collate_fn": list}
    steps = train(41, pieces, loaded, **options)
    assert steps == train(41, pieces, told, **options)
    seen = [index for piece in steps for step in piece for index in in_global_order(step)]
    order = epoch_order(41, seed=SEED, epoch=EPOCH, shuffle=True)
    # 12, 8 and 3 samples leave 18: four steps of 2 x 2 and, unless they are dropped, the last two.
    assert seen == (order[:39] if drop_last else order)


def test_telling_the_samples_of_a_batch_needs_an_order_of_ours() -> None:
    """Nobody knows what a sampler of the user's will give; the error of a batch that is not there says how many are."""
    own = build_dataloader({"dataset": Numbers(4), "sampler": [3, 1]}, seed=0, training=True)
    with pytest.raises(RuntimeError, match="not known"):
        own.indices_of(0, 0)
    (ours,) = loaders(4, Piece(1, 2, 0))
    with pytest.raises(ValueError, match="Epoch 1 has no batch 2; it has 2"):
        ours.indices_of(1, 2)
