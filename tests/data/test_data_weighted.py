"""Samples drawn by weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from stratagem.data import WeightedSampler, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError


class Rated(list):
    """A list of samples that knows how much each counts."""

    weights = (0.0, 1.0, 3.0)

    def ratings(self) -> torch.Tensor:
        """The same as a method."""
        return torch.tensor(self.weights)


def sampler(weights: Any = (0.0, 1.0, 3.0), **options: Any) -> WeightedSampler:
    """Return the sampler of one process over as many samples as there are weights."""
    return WeightedSampler(range(len(weights)), weights, **options, rank=0, world_size=1)


def test_with_replacement_samples_come_as_often_as_their_weights_say() -> None:
    """Of 40,000 draws by weights 0, 1 and 3 a quarter and three quarters; five standard deviations are 433."""
    counts = Counter(sampler(num_samples=40_000))
    assert counts[0] == 0
    assert abs(counts[1] - 10_000) < 433
    assert sum(counts.values()) == 40_000


def test_without_replacement_a_sample_comes_at_most_once_and_the_heavy_ones_early() -> None:
    """Of weights 1 and 3, the heavy sample is first three times out of four: of 4,000 epochs 3,000, +- 137."""
    drawing = sampler((1.0, 0.0, 3.0), replacement=False)
    assert len(drawing) == 2
    orders = Counter(tuple(drawing.order(epoch)) for epoch in range(4_000))
    assert set(orders) == {(0, 2), (2, 0)}
    assert abs(orders[2, 0] - 3_000) < 137


def test_an_order_hangs_on_the_seed_and_the_epoch_alone() -> None:
    """Asked again it is the same, and others give others."""
    weights = [1.0] * 30
    for replacement in (True, False):
        drawing = sampler(weights, seed=4, replacement=replacement)
        assert drawing.order(2) == sampler(weights, seed=4, replacement=replacement).order(2)
        assert drawing.order(2) != drawing.order(3)
        assert drawing.order(2) != sampler(weights, seed=5, replacement=replacement).order(2)


def test_the_dataset_may_have_the_weights() -> None:
    """Under the name of an attribute or of a method."""
    for name in ("weights", "ratings"):
        cfg = {"dataset": Rated("abc"), "batch_size": 9, "sampler": {"type": "WeightedSampler", "weights": name}}
        (batch,) = build_dataloader(cfg, seed=1, training=True).batches(0)
        assert len(batch) == 3
        assert set(batch) <= {"b", "c"}


def test_without_replacement_less_than_the_dataset_can_be_asked_for() -> None:
    """An epoch of two of a hundred samples."""
    assert len(set(sampler([1.0] * 100, num_samples=2, replacement=False))) == 2


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, -2.0], {}, "weight of sample 1 is -2.0"),
        ([float("nan")], {}, "weight of sample 0 is nan"),
        ([0.0, 0.0], {}, "none of the 2 weights is above 0"),
        (["heavy"], {}, "a weight is no number"),
        ([1.0], {"num_samples": 0}, "num_samples is 0"),
        ([1.0, 0.0], {"num_samples": 2, "replacement": False}, "2 samples are wanted without replacement, and 1 have"),
    ],
)
def test_weights_by_which_nothing_can_be_drawn_are_refused(weights: Any, options: Any, message: str) -> None:
    """The error shows which."""
    with pytest.raises(ConfigValueError, match=message):
        sampler(weights, **options)


def test_there_is_one_weight_for_each_sample() -> None:
    """Else nobody knows whose they are."""
    with pytest.raises(ConfigValueError, match="weights has 2 values, and the dataset has 3 samples"):
        WeightedSampler(range(3), [1.0, 2.0])
    with pytest.raises(ConfigValueError, match="weights='heavy': list has no attribute"):
        WeightedSampler([1], "heavy")
    with pytest.raises(ConfigTypeError, match=r"shape \(1, 2\)"):
        WeightedSampler([1], [[1.0, 2.0]])
    with pytest.raises(ConfigTypeError, match="one plain value for each sample"):
        WeightedSampler([1, 2], [[1.0, 2.0], [3.0]])
