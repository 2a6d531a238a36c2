"""Batches that hold samples of one group."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from stratagem.data import EpochLoader, GroupedBatchSampler, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError


class Texts(list):
    """Words, whose lengths are known."""

    def lengths(self) -> list[int]:
        """How many letters each has."""
        return [len(word) for word in self]


WORDS = Texts(["a", "bbb", "c", "dd", "eeee", "f", "ggg"])


def build(training: bool = True, ranks: int = 1, rank: int = 0, batch_size: int = 2, **options: Any) -> EpochLoader:
    """Build a loader of the words in batches of two, by length."""
    grouped = {"type": "GroupedBatchSampler", "groups": "lengths", **options}
    cfg = {"dataset": WORDS, "batch_size": batch_size, "batch_sampler": grouped, "collate_fn": list}
    return build_dataloader(cfg, seed=0, rank=rank, world_size=ranks, training=training)


def test_a_batch_has_samples_of_one_group() -> None:
    """In order, group by group, where nothing is shuffled; what is left of a group is a shorter batch."""
    loader = build(training=False)
    assert list(loader.batches(0)) == [["a", "c"], ["f"], ["dd"], ["bbb", "ggg"], ["eeee"]]
    assert (loader.length, loader.batch_size, loader.positioned) == (5, 2, True)


def test_bounds_part_measures_into_groups() -> None:
    """Lengths below 3 and from 3 on."""
    loader = build(training=False, bounds=[3])
    assert list(loader.batches(0)) == [["a", "c"], ["dd", "f"], ["bbb", "eeee"], ["ggg"]]


def test_short_batches_can_be_left_out() -> None:
    """Those of every group, and the length says so."""
    loader = build(training=False, drop_last=True)
    assert list(loader.batches(0)) == [["a", "c"], ["bbb", "ggg"]]
    assert loader.length == 2


def test_training_shuffles_samples_and_batches_anew_in_each_epoch() -> None:
    """Every sample once, and the batches are not in the order of the groups."""
    epochs = [list(build(bounds=[3]).batches(epoch)) for epoch in range(20)]
    assert all(sorted(word for batch in batches for word in batch) == sorted(WORDS) for batches in epochs)
    assert len({str(batches) for batches in epochs}) > 15
    assert len({len(batches[0][0]) < 3 for batches in epochs}) == 2


def test_an_epoch_is_taken_up_anywhere_without_loading_what_was_seen() -> None:
    """Its batches after any number of them."""
    whole = list(build().batches(3))
    for done in range(len(whole) + 1):
        assert list(build().batches(3, done)) == whole[done:]


def test_ranks_take_the_batches_in_turn() -> None:
    """Five batches for two ranks are three each in training, the first one again, and not filled up in evaluation."""
    (whole,) = [list(build().batches(1))]
    of_rank = [list(build(ranks=2, rank=rank).batches(1)) for rank in range(2)]
    assert of_rank == [whole[0::2], [*whole[1::2], whole[0]]]
    assert [build(training=False, ranks=2, rank=rank).length for rank in range(2)] == [3, 2]


def test_a_loader_that_has_one_already_is_taken_up_anywhere_too() -> None:
    """A DataLoader of one's own over a grouping sampler."""
    own = DataLoader(WORDS, batch_sampler=GroupedBatchSampler(WORDS, 2, "lengths", seed=1), collate_fn=list)
    loader = build_dataloader(own, seed=0, training=True)
    assert loader.positioned
    assert list(loader.batches(2, 1)) == list(loader.batches(2))[1:]
    grouped = GroupedBatchSampler(WORDS, 2, "lengths", seed=1)
    grouped.set_epoch(2)
    assert [[WORDS[index] for index in batch] for batch in grouped] == list(loader.batches(2))
    assert len(grouped) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": [3, 3]}, r"bounds=\[3, 3\] do not rise"),
        ({"bounds": [1.0], "groups": list("abcabca")}, "bounds part numbers"),
        ({"groups": [1, 2]}, "groups has 2 values, and the dataset has 7"),
        ({"groups": "shape"}, "groups='shape': Texts has no attribute"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_gives_no_groups_is_refused(options: Any, message: str) -> None:
    """The error shows what came."""
    with pytest.raises(ConfigValueError, match=message):
        build(**options)


def test_it_takes_no_sampler() -> None:
    """It has the dataset's samples itself; a sampler beside it would choose as well."""
    cfg = {
        "dataset": WORDS,
        "sampler": {"type": "DefaultSampler"},
        "batch_sampler": {"type": "GroupedBatchSampler", "groups": "lengths"},
    }
    with pytest.raises(ConfigValueError, match="takes no sampler; give it shuffle"):
        build_dataloader(cfg, seed=0, training=True)
    with pytest.raises(ConfigTypeError, match="drop_lst"):
        build(drop_lst=True)
