"""Batches with samples of one group."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from stratagem.data import EpochLoader, GroupedBatchSampler, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError


class Texts(list):
    """A dataset of words whose lengths are known."""

    def lengths(self) -> list[int]:
        """Return the number of letters of each word."""
        return [len(word) for word in self]


WORDS = Texts(["a", "bbb", "c", "dd", "eeee", "f", "ggg"])


def build(training: bool = True, ranks: int = 1, rank: int = 0, batch_size: int = 2, **options: Any) -> EpochLoader:
    """Build a loader of the words in batches of two, grouped by length."""
    grouped = {"type": "GroupedBatchSampler", "groups": "lengths", **options}
    cfg = {"dataset": WORDS, "batch_size": batch_size, "batch_sampler": grouped, "collate_fn": list}
    return build_dataloader(cfg, seed=0, rank=rank, world_size=ranks, training=training)


def test_a_batch_has_samples_of_one_group() -> None:
    """Without shuffling, groups are in order, and the rest of a group is a shorter batch."""
    loader = build(training=False)
    assert list(loader.batches(0)) == [["a", "c"], ["f"], ["dd"], ["bbb", "ggg"], ["eeee"]]
    assert (loader.length, loader.batch_size, loader.positioned) == (5, 2, True)


def test_bounds_split_values_into_groups() -> None:
    """``bounds`` splits the words into lengths below 3 and from 3."""
    loader = build(training=False, bounds=[3])
    assert list(loader.batches(0)) == [["a", "c"], ["dd", "f"], ["bbb", "eeee"], ["ggg"]]


def test_incomplete_batches_can_be_dropped() -> None:
    """With ``drop_last``, the incomplete batches of all groups are dropped and not counted."""
    loader = build(training=False, drop_last=True)
    assert list(loader.batches(0)) == [["a", "c"], ["bbb", "ggg"]]
    assert loader.length == 2


def test_training_shuffles_samples_and_batches() -> None:
    """In training, samples and batches are shuffled in each epoch, and every sample is used once."""
    epochs = [list(build(bounds=[3]).batches(epoch)) for epoch in range(20)]
    assert all(sorted(word for batch in batches for word in batch) == sorted(WORDS) for batches in epochs)
    assert len({str(batches) for batches in epochs}) > 15
    assert len({len(batches[0][0]) < 3 for batches in epochs}) == 2


def test_an_epoch_can_be_resumed_at_any_batch() -> None:
    """An epoch can be resumed after any batch without loading earlier ones."""
    whole = list(build().batches(3))
    for done in range(len(whole) + 1):
        assert list(build().batches(3, done)) == whole[done:]


def test_ranks_take_the_batches_in_turn() -> None:
    """Of five batches, two ranks get three each in training, with one repetition, and three or two in evaluation."""
    (whole,) = [list(build().batches(1))]
    of_rank = [list(build(ranks=2, rank=rank).batches(1)) for rank in range(2)]
    assert of_rank == [whole[0::2], [*whole[1::2], whole[0]]]
    assert [build(training=False, ranks=2, rank=rank).length for rank in range(2)] == [3, 2]


def test_a_loader_instance_can_be_resumed_at_any_batch() -> None:
    """A DataLoader instance with a grouping sampler can be resumed at any batch."""
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
        ({"bounds": [3, 3]}, r"bounds=\[3, 3\] must be increasing"),
        ({"bounds": [1.0], "groups": list("abcabca")}, "bounds require numeric groups"),
        ({"groups": [1, 2]}, "groups has 2 values, but the dataset has 7"),
        ({"groups": "shape"}, "groups='shape': Texts has no attribute"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_invalid_groups_are_rejected(options: Any, message: str) -> None:
    """Invalid groups raise an error that shows the values."""
    with pytest.raises(ConfigValueError, match=message):
        build(**options)


def test_a_sampler_is_rejected() -> None:
    """A sampler in addition to the grouping batch sampler raises an error."""
    cfg = {
        "dataset": WORDS,
        "sampler": {"type": "DefaultSampler"},
        "batch_sampler": {"type": "GroupedBatchSampler", "groups": "lengths"},
    }
    with pytest.raises(ConfigValueError, match="does not take a sampler; set shuffle"):
        build_dataloader(cfg, seed=0, training=True)
    with pytest.raises(ConfigTypeError, match="drop_lst"):
        build(drop_lst=True)
