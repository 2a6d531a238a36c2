"""Means over the last iterations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stratagem.errors import ConfigValueError
from stratagem.logging import ScalarWindow


def window(*outputs: dict[str, Any], size: int = 10) -> ScalarWindow:
    """Return a window that holds these outputs."""
    made = ScalarWindow(size)
    for output in outputs:
        made.append(output)
    return made


def test_means_are_over_the_last_iterations() -> None:
    """Of 1, 2, 3, 4 a window of three remembers 2, 3, 4: the mean is 3."""
    made = window(*({"loss": torch.tensor(float(value))} for value in (1, 2, 3, 4)), size=3)
    assert made.means() == {"loss": 3.0}
    assert len(made) == 3


def test_fewer_iterations_can_be_asked_for() -> None:
    """The newest alone, or the newest two; more than there are means all."""
    made = window({"loss": 1}, {"loss": 2}, {"loss": 6})
    assert made.means(last=1) == {"loss": 6.0}
    assert made.means(last=2) == {"loss": 4.0}
    assert made.means(last=99) == {"loss": 3.0}


def test_names_may_come_and_go() -> None:
    """A value that is logged every second iteration has the mean of those iterations; names are sorted."""
    made = window({"loss": 1.0, "b": 4}, {"loss": 3.0}, {"loss": 5.0, "a": 7, "b": 6})
    assert list(made.means().items()) == [("a", 7.0), ("b", 5.0), ("loss", 3.0)]


def test_all_kinds_of_scalars_count() -> None:
    """Numbers of Python and NumPy and tensors of one element, of any shape and type, are mixed freely."""
    values: list[Any] = [1, 2.0, np.float32(3), torch.tensor(4), torch.tensor([[5.0]], dtype=torch.bfloat16), True]
    made = window(*({"x": value} for value in values))
    assert made.means() == {"x": pytest.approx(16 / 6)}


def test_other_values_are_left_out() -> None:
    """Predictions, text and complex numbers in the outputs of a model do no harm."""
    made = window(
        {"loss": 1.0, "logits": torch.zeros(2, 3), "name": "x", "none": None, "z": torch.tensor(1j), "l": [1]}
    )
    assert made.means() == {"loss": 1.0}


def test_nan_is_shown() -> None:
    """A loss that is no number makes its mean none, instead of being hidden."""
    assert math.isnan(window({"loss": 1.0}, {"loss": torch.tensor(float("nan"))}).means()["loss"])


def test_tensors_with_gradient_are_read() -> None:
    """A loss that was not detached is read without a warning."""
    assert window({"loss": torch.tensor(2.0, requires_grad=True) * 2}).means() == {"loss": 4.0}


def test_an_empty_window_has_no_means() -> None:
    """Before the first iteration, and after clear(), there is nothing."""
    made = window({"loss": 1})
    made.clear()
    assert made.means() == {}
    assert len(made) == 0


def test_adding_copies_nothing() -> None:
    """The outputs are kept as they came: by reference."""
    value = torch.tensor(1.0)
    made = window({"loss": value})
    value.fill_(5.0)
    assert made.means() == {"loss": 5.0}


def test_all_tensors_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is waited for once per log line, not once per value."""
    copies = 0
    tolist = Tensor.tolist

    def count(tensor: Tensor) -> Any:
        nonlocal copies
        copies += 1
        return tolist(tensor)

    def refuse(tensor: Tensor) -> float:
        raise AssertionError("a single value was copied")

    monkeypatch.setattr(Tensor, "tolist", count)
    monkeypatch.setattr(Tensor, "item", refuse)
    monkeypatch.setattr(Tensor, "__float__", refuse)
    made = window(*({"loss": torch.tensor(1.0), "acc": torch.tensor(0.5)} for _ in range(5)))
    assert made.means() == {"acc": 0.5, "loss": 1.0}
    assert copies == 1


def test_means_are_averaged_over_ranks_by_name() -> None:
    """All means go through reduce in one call; here the other rank has another name, which is in the result."""
    seen: list[dict[str, float]] = []

    def with_other_rank(means: dict[str, float]) -> dict[str, float]:
        seen.append(means)
        return {**means, "box": 3.0}

    found = window({"loss": 2.0, "acc": 1.0}).means(reduce=with_other_rank)
    assert found == {"acc": 1.0, "loss": 2.0, "box": 3.0}
    assert seen == [{"acc": 1.0, "loss": 2.0}]


def test_reduce_is_called_for_an_empty_window_too() -> None:
    """A collective is run by every rank, so nothing is skipped."""
    calls = []
    assert window().means(reduce=lambda means: calls.append(1) or means) == {}  # type: ignore[func-returns-value]
    assert calls == [1]


def test_sizes_must_be_positive() -> None:
    """A window of nothing is refused, and so is looking at no iteration."""
    with pytest.raises(ConfigValueError, match="size 0"):
        ScalarWindow(0)
    with pytest.raises(ConfigValueError, match="last is 0"):
        window({"loss": 1}).means(last=0)


def test_a_large_count_is_not_rounded_beside_a_loss() -> None:
    """2^24 + 1 tokens is no float32, the type of the loss that is logged with it."""
    made = window({"loss": torch.tensor(0.5), "tokens": torch.tensor(2**24 + 1)})
    assert made.means() == {"loss": 0.5, "tokens": 16777217.0}
