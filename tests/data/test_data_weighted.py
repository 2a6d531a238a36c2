"""Sampling by weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from stratagem.data import WeightedSampler, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError


class Rated(list):
    """A list of samples with weights."""

    weights = (0.0, 1.0, 3.0)

    def ratings(self) -> torch.Tensor:
        """Return the weights from a method."""
        return torch.tensor(self.weights)


def sampler(weights: Any = (0.0, 1.0, 3.0), **options: Any) -> WeightedSampler:
    """Return the sampler of one process, with one sample per weight."""
    return WeightedSampler(range(len(weights)), weights, **options, rank=0, world_size=1)


def test_sampling_with_replacement_follows_the_weights() -> None:
    """With weights 0, 1 and 3, 10,000 of 40,000 draws return the second sample, within five standard deviations (433)."""
    counts = Counter(sampler(num_samples=40_000))
    assert counts[0] == 0
    assert abs(counts[1] - 10_000) < 433
    assert sum(counts.values()) == 40_000


@pytest.mark.slow
def test_sampling_without_replacement_prefers_large_weights() -> None:
    """With weights 1 and 3, the second sample comes first in 3,000 +- 137 of 4,000 epochs, and no sample is repeated."""
    drawing = sampler((1.0, 0.0, 3.0), replacement=False)
    assert len(drawing) == 2
    orders = Counter(tuple(drawing.order(epoch)) for epoch in range(4_000))
    assert set(orders) == {(0, 2), (2, 0)}
    assert abs(orders[2, 0] - 3_000) < 137


def test_an_order_depends_only_on_the_seed_and_the_epoch() -> None:
    """The order depends only on the seed and the epoch."""
    weights = [1.0] * 30
    for replacement in (True, False):
        drawing = sampler(weights, seed=4, replacement=replacement)
        assert drawing.order(2) == sampler(weights, seed=4, replacement=replacement).order(2)
        assert drawing.order(2) != drawing.order(3)
        assert drawing.order(2) != sampler(weights, seed=5, replacement=replacement).order(2)


def test_the_dataset_may_provide_the_weights() -> None:
    """The weights may be an attribute or a method of the dataset."""
    for name in ("weights", "ratings"):
        cfg = {"dataset": Rated("abc"), "batch_size": 9, "sampler": {"type": "WeightedSampler", "weights": name}}
        (batch,) = build_dataloader(cfg, seed=1, training=True).batches(0)
        assert len(batch) == 3
        assert set(batch) <= {"b", "c"}


def test_an_epoch_may_be_smaller_than_the_dataset() -> None:
    """Without replacement, an epoch may contain fewer samples than the dataset."""
    assert len(set(sampler([1.0] * 100, num_samples=2, replacement=False))) == 2


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, -2.0], {}, "weight of sample 1 is -2.0"),
        ([float("nan")], {}, "weight of sample 0 is nan"),
        ([0.0, 0.0], {}, "all 2 weights are 0"),
        (["heavy"], {}, "a weight is not a number"),
        ([1.0], {"num_samples": 0}, "num_samples is 0"),
        (
            [1.0, 0.0],
            {"num_samples": 2, "replacement": False},
            "cannot draw 2 samples without replacement, because only 1 have",
        ),
    ],
)
def test_invalid_weights_are_rejected(weights: Any, options: Any, message: str) -> None:
    """Invalid weights raise an error that shows them."""
    with pytest.raises(ConfigValueError, match=message):
        sampler(weights, **options)


def test_each_sample_needs_one_weight() -> None:
    """Each sample needs exactly one weight."""
    with pytest.raises(ConfigValueError, match="weights has 2 values, but the dataset has 3 samples"):
        WeightedSampler(range(3), [1.0, 2.0])
    with pytest.raises(ConfigValueError, match="weights='heavy': list has no attribute"):
        WeightedSampler([1], "heavy")
    with pytest.raises(ConfigTypeError, match=r"shape \(1, 2\)"):
        WeightedSampler([1], [[1.0, 2.0]])
    with pytest.raises(ConfigTypeError, match="one value per sample"):
        WeightedSampler([1, 2], [[1.0, 2.0], [3.0]])
