"""Each sample is used once per epoch across any number of restarts, tested with positions only and with real workers."""

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
from tests.support.properties import examples

SEED, EPOCH = 5, 3


@dataclass(frozen=True)
class Piece:
    """A session of a run: the number of ranks and workers, the batch size, and the number of batches until it stops."""

    ranks: int
    batch: int
    stop: int
    workers: int = 0


class Numbers(Dataset):
    """A dataset whose samples are their indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index

    @property
    def remainders(self) -> list[int]:
        """The group, one of three, of each sample."""
        return [index % 3 for index in range(self.length)]


def loaders(length: int, piece: Piece, **options: Any) -> list[EpochLoader]:
    """Return the loader of each rank."""
    cfg = {"dataset": Numbers(length), "batch_size": piece.batch, "num_workers": piece.workers, **options}
    return [
        build_dataloader(cfg, seed=SEED, rank=rank, world_size=piece.ranks, training=True)
        for rank in range(piece.ranks)
    ]


Read = Callable[[EpochLoader, int, int], list[Sequence[int]]]


def indices_of_batches(loader: EpochLoader, first: int, count: int) -> list[Sequence[int]]:
    """Return the samples of batches without loading them."""
    return [loader.indices_of(EPOCH, batch) for batch in range(first, first + count)]


def loaded(loader: EpochLoader, first: int, count: int) -> list[Sequence[int]]:
    """Load the batches."""
    batches = loader.batches(EPOCH, first)
    return [next(batches) for _ in range(count)]


def train(
    length: int, pieces: list[Piece], read: Read = indices_of_batches, **options: Any
) -> list[list[list[Sequence[int]]]]:
    """Train one epoch in several sessions; return the batches of all ranks for each step of each session."""
    batch, taken = 0, ()
    steps = []
    for number, piece in enumerate(pieces):
        ranks = loaders(length, piece, **options)
        starts = {loader.resume_at(EPOCH, batch, taken) for loader in ranks}
        assert len(starts) == 1, "all ranks must be at the same batch"
        (batch,) = starts
        total = ranks[0].length
        assert total is not None
        left = total - batch
        count = left if number == len(pieces) - 1 else min(piece.stop, left)
        steps.append(list(map(list, zip(*(read(loader, batch, count) for loader in ranks), strict=True))))
        batch += count
        (saved,) = {loader.consumed(EPOCH, batch) for loader in ranks}
        # A checkpoint stores the position as JSON.
        taken = json.loads(json.dumps(saved))
    return steps


def in_global_order(step: list[Sequence[int]]) -> list[int]:
    """Return the samples of a step in the global order."""
    longest = max(map(len, step))
    return [batch[place] for place in range(longest) for batch in step if place < len(batch)]


lengths = st.integers(1, 60)
restarts = st.lists(st.builds(Piece, st.integers(1, 5), st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=examples(1500), deadline=None)
@given(lengths, restarts, st.booleans(), st.booleans())
def test_any_restarts_give_each_sample_once_in_order(
    length: int, pieces: list[Piece], shuffle: bool, drop_last: bool
) -> None:
    """The samples of all sessions form the global order of the epoch, except for padding or dropped samples at its end."""
    order = epoch_order(length, seed=SEED, epoch=EPOCH, shuffle=shuffle)
    steps = [step for piece in train(length, pieces, shuffle=shuffle, drop_last=drop_last) for step in piece]
    seen = [index for step in steps for index in in_global_order(step)]
    assert seen[:length] == order[: len(seen)]
    if drop_last:
        last = pieces[-1]
        assert length - len(seen) < last.batch * last.ranks
    else:
        assert len(seen) >= length
    # The padding has fewer samples than there are ranks.
    assert len(seen) - length < max(piece.ranks for piece in pieces)
    assert all(len({len(batch) for batch in step}) == 1 for step in steps)


@pytest.mark.slow
@settings(max_examples=examples(700), deadline=None)
@given(lengths, restarts, st.booleans(), st.booleans())
def test_grouped_batches_give_each_sample_once_over_any_restarts(
    length: int, pieces: list[Piece], shuffle: bool, drop_last: bool
) -> None:
    """Each sample occurs once, even if a new batch size splits the rest of the epoch again."""
    sampler = {"type": "GroupedBatchSampler", "groups": "remainders", "drop_last": drop_last}
    steps = train(length, pieces, batch_sampler=sampler, shuffle=shuffle)
    batches = [batch for piece in steps for step in piece for batch in step]
    assert all(len({index % 3 for index in batch}) == 1 for batch in batches)
    # Only the last step may be padded, after the batch of the first rank, with batches from the beginning. Samples
    # that drop_last omitted may occur later, if smaller batches are used then.
    last = [piece[-1] for piece in steps if piece]
    filled = last if drop_last else last[-1:]
    ends = [batch for step in filled for batch in step[1:]]
    counts = Counter(index for batch in batches for index in batch)
    counts.subtract(Counter(index for batch in ends for index in batch))
    assert not counts or max(counts.values()) == 1
    if not drop_last:
        assert {index for batch in batches for index in batch} == set(range(length))


@pytest.mark.slow
@settings(max_examples=examples(150), deadline=None)
@given(lengths, restarts)
def test_grouped_batches_keep_their_order_if_only_the_ranks_change(length: int, pieces: list[Piece]) -> None:
    """The ranks take the same batches in turn, for any number of ranks."""
    size = pieces[0].batch
    pieces = [Piece(piece.ranks, size, piece.stop) for piece in pieces]
    sampler = {"type": "GroupedBatchSampler", "groups": "remainders"}
    (whole,) = train(length, [Piece(1, size, 0)], batch_sampler=sampler)
    steps = train(length, pieces, batch_sampler=sampler)
    batches = [batch for piece in steps for step in piece for batch in step]
    assert batches[: len(whole)] == [step[0] for step in whole]


@pytest.mark.slow
@settings(max_examples=examples(300), deadline=None)
@given(st.integers(1, 30), restarts)
def test_a_weighted_order_can_be_resumed(length: int, pieces: list[Piece]) -> None:
    """With replacement, an epoch that is stopped and resumed draws the same sequence of samples."""
    sampler = {"type": "WeightedSampler", "weights": [1 + index % 4 for index in range(length)], "num_samples": 40}
    (whole,) = train(length, [Piece(1, 1, 0)], sampler=sampler)
    steps = [step for piece in train(length, pieces, sampler=sampler) for step in piece]
    seen = [index for step in steps for index in in_global_order(step)]
    assert seen[:40] == [step[0][0] for step in whole]


@pytest.mark.slow
@settings(max_examples=examples(300), deadline=None)
@given(st.integers(1, 20), restarts)
def test_infinite_data_can_be_resumed(length: int, pieces: list[Piece]) -> None:
    """Successive passes form one sequence for any number of ranks."""
    seen: list[int] = []
    batch, taken = 0, ()
    for piece in pieces:
        ranks = loaders(length, piece, sampler={"type": "InfiniteSampler"})
        for loader in ranks:
            assert loader.resume_at(0, batch, taken) == batch
        for number in range(batch, batch + piece.stop):
            seen += in_global_order([loader.indices_of(0, number) for loader in ranks])
        batch += piece.stop
        taken = ranks[0].consumed(0, batch)
    passes = range(math.ceil(len(seen) / length))
    sequence = [index for number in passes for index in epoch_order(length, seed=SEED, epoch=number, shuffle=True)]
    assert seen == sequence[: len(seen)]


def test_epochs_of_infinite_data_are_consecutive_after_a_new_batch_size() -> None:
    """An epoch that is resumed with a different batch size ends where the next one begins."""
    small = loaders(10, Piece(1, 2, 0), sampler={"type": "InfiniteSampler", "shuffle": False})[0]
    large = loaders(10, Piece(1, 5, 0), sampler={"type": "InfiniteSampler", "shuffle": False})[0]
    # Epoch 1 has five batches of two. After one of them, 12 samples are consumed, the last of which is sample 1.
    assert large.resume_at(1, 1, small.consumed(1, 1)) == 1
    assert [large.indices_of(1, 1), large.indices_of(2, 0), large.indices_of(2, 1)] == [
        [2, 3, 4, 5, 6],
        [7, 8, 9, 0, 1],
        [2, 3, 4, 5, 6],
    ]
    assert large.consumed(2, 0) == ((2, 6), (5, 1))


def test_a_completed_epoch_has_no_batches_left() -> None:
    """Seven ranks pad five samples to seven, so a resumed rank may read a number of consumed samples above five."""
    (one,) = loaders(5, Piece(1, 2, 0))
    assert one.resume_at(EPOCH, 1, [[1, 7]]) == one.length == 3
    assert list(one.batches(EPOCH, 3)) == []


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True])
def test_real_workers_give_each_sample_once_over_restarts(drop_last: bool) -> None:
    """With different workers, ranks and batch sizes in each piece, the loaded samples match the computed ones."""
    pieces = [Piece(2, 3, 2, workers=2), Piece(1, 4, 2), Piece(3, 1, 1, workers=1), Piece(2, 2, 0)]
    options = {"drop_last": drop_last, "collate_fn": list}
    steps = train(41, pieces, loaded, **options)
    assert steps == train(41, pieces, indices_of_batches, **options)
    seen = [index for piece in steps for step in piece for index in in_global_order(step)]
    order = epoch_order(41, seed=SEED, epoch=EPOCH, shuffle=True)
    # 12, 8 and 3 samples leave 18: four steps of 2 x 2, and the last two unless they are dropped.
    assert seen == (order[:39] if drop_last else order)


def test_samples_can_only_be_computed_for_built_in_samplers() -> None:
    """Samples of a custom sampler cannot be computed; the error for a missing batch contains the number of batches."""
    own = build_dataloader({"dataset": Numbers(4), "sampler": [3, 1]}, seed=0, training=True)
    with pytest.raises(RuntimeError, match="are unknown"):
        own.indices_of(0, 0)
    (ours,) = loaders(4, Piece(1, 2, 0))
    with pytest.raises(ValueError, match="Epoch 1 has no batch 2; it has 2"):
        ours.indices_of(1, 2)
