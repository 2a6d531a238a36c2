"""Means over the last iterations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stratagem.errors import ConfigValueError
from stratagem.logging import ScalarSmoother


def window(*outputs: dict[str, Any], size: int = 10) -> ScalarSmoother:
    """Return a window that contains these outputs."""
    made = ScalarSmoother(size)
    for output in outputs:
        made.append(output)
    return made


def test_means_are_over_the_last_iterations() -> None:
    """A window of size 3 keeps 2, 3 and 4 of the values 1, 2, 3 and 4; their mean is 3."""
    made = window(*({"loss": torch.tensor(float(value))} for value in (1, 2, 3, 4)), size=3)
    assert made.means() == {"loss": 3.0}
    assert len(made) == 3


def test_means_can_be_limited_to_the_latest_iterations() -> None:
    """``last`` limits the means to the latest iterations; a larger value than the window means all of them."""
    made = window({"loss": 1}, {"loss": 2}, {"loss": 6})
    assert made.means(last=1) == {"loss": 6.0}
    assert made.means(last=2) == {"loss": 4.0}
    assert made.means(last=99) == {"loss": 3.0}


def test_names_may_differ_between_iterations() -> None:
    """A name that is not logged in every iteration is averaged over those that contain it; names are sorted."""
    made = window({"loss": 1.0, "b": 4}, {"loss": 3.0}, {"loss": 5.0, "a": 7, "b": 6})
    assert list(made.means().items()) == [("a", 7.0), ("b", 5.0), ("loss", 3.0)]


def test_all_scalar_types_are_averaged() -> None:
    """Python numbers, NumPy numbers and tensors with one element of any shape and type can be mixed."""
    values: list[Any] = [1, 2.0, np.float32(3), torch.tensor(4), torch.tensor([[5.0]], dtype=torch.bfloat16), True]
    made = window(*({"x": value} for value in values))
    assert made.means() == {"x": pytest.approx(16 / 6)}


def test_other_values_are_ignored() -> None:
    """Predictions, strings and complex numbers in the outputs of a model are ignored."""
    made = window(
        {"loss": 1.0, "logits": torch.zeros(2, 3), "name": "x", "none": None, "z": torch.tensor(1j), "l": [1]}
    )
    assert made.means() == {"loss": 1.0}


def test_nan_is_shown() -> None:
    """A NaN loss makes the mean NaN instead of being hidden."""
    assert math.isnan(window({"loss": 1.0}, {"loss": torch.tensor(float("nan"))}).means()["loss"])


def test_tensors_that_require_grad_are_read() -> None:
    """A loss that was not detached is read without a warning."""
    assert window({"loss": torch.tensor(2.0, requires_grad=True) * 2}).means() == {"loss": 4.0}


def test_an_empty_window_has_no_means() -> None:
    """There are no means before the first iteration and after ``clear()``."""
    made = window({"loss": 1})
    made.clear()
    assert made.means() == {}
    assert len(made) == 0


def test_append_does_not_copy() -> None:
    """Outputs are stored by reference."""
    value = torch.tensor(1.0)
    made = window({"loss": value})
    value.fill_(5.0)
    assert made.means() == {"loss": 5.0}


def test_all_tensors_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are copied from the device at once for each log line, not one by one."""
    copies = 0
    tolist = Tensor.tolist

    def count(tensor: Tensor) -> Any:
        nonlocal copies
        copies += 1
        return tolist(tensor)

    def reject(tensor: Tensor) -> float:
        raise AssertionError("a single value was copied")

    monkeypatch.setattr(Tensor, "tolist", count)
    monkeypatch.setattr(Tensor, "item", reject)
    monkeypatch.setattr(Tensor, "__float__", reject)
    made = window(*({"loss": torch.tensor(1.0), "acc": torch.tensor(0.5)} for _ in range(5)))
    assert made.means() == {"acc": 0.5, "loss": 1.0}
    assert copies == 1


def test_means_are_averaged_over_ranks_by_name() -> None:
    """All means are passed to ``reduce`` in one call; the result may contain names from other ranks."""
    seen: list[dict[str, float]] = []

    def with_other_rank(means: dict[str, float]) -> dict[str, float]:
        seen.append(means)
        return {**means, "box": 3.0}

    found = window({"loss": 2.0, "acc": 1.0}).means(reduce=with_other_rank)
    assert found == {"acc": 1.0, "loss": 2.0, "box": 3.0}
    assert seen == [{"acc": 1.0, "loss": 2.0}]


def test_reduce_is_called_for_an_empty_window() -> None:
    """``reduce`` is a collective, so every rank calls it, even with an empty window."""
    calls = []
    assert window().means(reduce=lambda means: calls.append(1) or means) == {}  # type: ignore[func-returns-value]
    assert calls == [1]


def test_sizes_must_be_positive() -> None:
    """A window size and a ``last`` of zero are rejected."""
    with pytest.raises(ConfigValueError, match="size is 0"):
        ScalarSmoother(0)
    with pytest.raises(ConfigValueError, match="last is 0"):
        window({"loss": 1}).means(last=0)


def test_a_large_count_is_not_rounded_next_to_a_loss() -> None:
    """2^24 + 1 tokens are not rounded to float32, the type of the loss in the same window."""
    made = window({"loss": torch.tensor(0.5), "tokens": torch.tensor(2**24 + 1)})
    assert made.means() == {"loss": 0.5, "tokens": 16777217.0}
