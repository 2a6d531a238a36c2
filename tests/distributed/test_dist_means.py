"""Means over ranks, matched by name."""

from __future__ import annotations

import math

import pytest
from torch.distributed import get_rank, group

from stratagem.dist import all_gather_object, mean_by_name
from stratagem.logging import ScalarSmoother
from tests.support.ranks import Ranks

MANY = 130


def means(values: tuple[dict[str, float], dict[str, float]]) -> dict[str, float]:
    """Return the means of the values of both ranks."""
    found = mean_by_name(values[get_rank()])
    # The group still works, so all ranks are in the same collective.
    assert all_gather_object(get_rank()) == [0, 1]
    return found


def test_one_process_keeps_its_values() -> None:
    """In one process, the values are returned as floats, sorted by name."""
    assert list(mean_by_name({"b": 2, "a": 1.5}).items()) == [("a", 1.5), ("b", 2.0)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"loss": 1.0, "acc": 4.0}, {"acc": 6.0, "loss": 3.0}, {"acc": 5.0, "loss": 2.0}),
        ({"loss": 2.0, "mask": 1.0}, {"loss": 4.0, "box": 3.0}, {"box": 3.0, "loss": 3.0, "mask": 1.0}),
        ({"loss": 1.0}, {"acc": 0.5, "loss": 3.0}, {"acc": 0.5, "loss": 2.0}),
        ({}, {"loss": 3.0}, {"loss": 3.0}),
        ({}, {}, {}),
        ({"a,b": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 2.0, "a,b": 1.0, "b": 3.0}),
        ({"tokens": 2**24 + 1.0}, {"tokens": 2**24 + 3.0}, {"tokens": 2**24 + 2.0}),
        ({"tokens": 2**40 + 1.0}, {"tokens": 2**40 + 3.0, "x": 0.0}, {"tokens": 2**40 + 2.0, "x": 0.0}),
        ({"a": math.inf, "b": 1.0}, {"a": 1.0, "b": 3.0}, {"a": math.inf, "b": 2.0}),
        ({f"v{i:03}": float(i) for i in range(MANY)},) * 2 + ({f"v{i:03}": float(i) for i in range(MANY)},),
        (
            {f"v{i:03}": 1.0 for i in range(MANY)},
            {f"v{i:03}": 3.0 for i in range(1, MANY + 1)},
            {"v000": 1.0, **{f"v{i:03}": 2.0 for i in range(1, MANY)}, f"v{MANY}": 3.0},
        ),
    ],
)
def test_a_mean_is_over_the_ranks_that_have_the_name(
    ranks: Ranks, first: dict[str, float], second: dict[str, float], expected: dict[str, float]
) -> None:
    """A name is averaged over the ranks that have it, and both ranks get the same result for any set of names."""
    for found in ranks.run(means, (first, second)):
        assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("other", [{"a": 1.0, "b": 2.0}, {"a": 1.0}])
def test_a_nan_on_one_rank_is_visible(ranks: Ranks, other: dict[str, float]) -> None:
    """A NaN on one rank makes the mean of its name NaN, and does not affect other names."""
    for found in ranks.run(means, ({"a": 1.0, "b": math.nan}, other)):
        assert found["a"] == 1.0
        assert math.isnan(found["b"])


def window_means() -> dict[str, float]:
    """Return the means of logging windows with different names on each rank."""
    window = ScalarSmoother(4)
    name, value = (("mask", 1), ("box", 3))[get_rank()]
    for step in range(2):
        window.append({"loss": float(value), **({name: value} if step else {})})
    return window.means(reduce=mean_by_name)


def test_values_are_averaged_over_iterations_then_ranks(ranks: Ranks) -> None:
    """Values are averaged first over the iterations of a rank that contain them, then over ranks."""
    assert ranks.run(window_means) == [{"box": 3.0, "loss": 2.0, "mask": 1.0}] * 2


def collectives(values: tuple[dict[str, float], dict[str, float]]) -> int:
    """Return the number of collectives in ``mean_by_name``, from the sequence number of the process group."""
    before = group.WORLD._get_sequence_number_for_group()
    mean_by_name(values[get_rank()])
    return group.WORLD._get_sequence_number_for_group() - before


def test_equal_names_take_one_collective(ranks: Ranks) -> None:
    """If all ranks have the same names, which is the usual case, one collective is sufficient."""
    equal = {f"v{number}": 1.0 for number in range(48)}
    other = {f"w{number}": 1.0 for number in range(48)}
    assert ranks.run(collectives, (equal, equal)) == [1, 1]
    assert min(ranks.run(collectives, (equal, other))) > 1
