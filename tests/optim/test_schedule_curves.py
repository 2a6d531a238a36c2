"""Compare all schedules with those of torch, or with values computed by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

from stratagem.errors import ConfigValueError
from stratagem.optim import (
    ConstantLR,
    CosineAnnealingLR,
    CosineRestartLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ParamScheduler,
    PolyLR,
    StepLR,
    WarmupStableDecayLR,
)


def optimizer(lr: float = 1.0) -> SGD:
    """Return an optimizer with one parameter."""
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def values(make: Callable[[Optimizer], Any], count: int, lr: float = 1.0) -> list[float]:
    """Return the learning rate at positions 0 to ``count - 1``."""
    optim = optimizer(lr)
    schedule = make(optim)
    seen = []
    for _ in range(count):
        seen.append(optim.param_groups[0]["lr"])
        optim.step()
        schedule.step()
    return seen


AS_IN_TORCH = {
    "step": (lambda o: StepLR(o, 3, gamma=0.5), lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5)),
    "multi-step": (
        lambda o: MultiStepLR(o, [2, 5, 5, 9], gamma=0.5),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 9], gamma=0.5),
    ),
    "exponential": (lambda o: ExponentialLR(o, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    # The last position of the range, 7, has the final value, which torch reaches after 7 steps.
    "constant": (lambda o: ConstantLR(o, 0.25, end=8), lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=7)),
    "linear": (
        lambda o: LinearLR(o, start_factor=0.2, end_factor=0.9, end=8),
        lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, total_iters=7),
    ),
    "poly": (lambda o: PolyLR(o, power=2.0, end=8), lambda o: lr_scheduler.PolynomialLR(o, 7, power=2.0)),
    "cosine": (
        lambda o: CosineAnnealingLR(o, T_max=10, eta_min=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.1),
    ),
    "restart": (
        lambda o: CosineRestartLR(o, periods=[5, 5, 5], restart_weights=[1, 1, 1], eta_min=0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.1),
    ),
    "one-cycle": (
        lambda o: OneCycleLR(o, eta_max=0.7, total_steps=14),
        lambda o: lr_scheduler.OneCycleLR(o, 0.7, total_steps=14, cycle_momentum=False),
    ),
    "one-cycle, linear": (
        lambda o: OneCycleLR(o, eta_max=0.7, pct_start=0.4, anneal_strategy="linear", div_factor=10, end=14),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.7, total_steps=14, pct_start=0.4, anneal_strategy="linear", div_factor=10, cycle_momentum=False
        ),
    ),
    "one-cycle, three phases": (
        lambda o: OneCycleLR(o, eta_max=0.7, total_steps=14, three_phase=True),
        lambda o: lr_scheduler.OneCycleLR(o, 0.7, total_steps=14, three_phase=True, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize("name", AS_IN_TORCH)
def test_curves_match_torch(name: str) -> None:
    """The values match those of torch's schedule over the whole range."""
    ours, theirs = AS_IN_TORCH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's first step warns about an order that is correct here
        expected = values(theirs, 14)
    assert values(ours, 14) == pytest.approx(expected, abs=1e-12)


def test_polynomial_decay_reaches_its_floor() -> None:
    """Polynomial decay over four positions from 1 to 0.4 decreases by a third of 0.6 at each."""
    assert values(lambda o: PolyLR(o, eta_min=0.4, end=4), 6) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.4, 0.4])


def test_a_cosine_covers_its_whole_range_by_default() -> None:
    """By default, the cosine covers the range: over four positions, 0, 45, 90 and 135 degrees."""
    half = 0.5**0.5
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2, (1 - half) / 2]
    assert values(lambda o: CosineAnnealingLR(o, end=4), 5) == pytest.approx(expected)


def test_the_floor_may_be_relative() -> None:
    """``eta_min_ratio=0.1`` with a learning rate of 2 is a floor of 0.2, reached at T_max."""
    assert values(lambda o: CosineAnnealingLR(o, T_max=2, eta_min_ratio=0.1), 3, lr=2.0) == pytest.approx(
        [2.0, 1.1, 0.2]
    )


def test_each_period_has_its_length_and_weight() -> None:
    """The second period has four positions and half the amplitude; the floor remains after the last."""
    half = 0.5**0.5
    expected = [1.0, 0.5, 0.5, (1 + half) / 4, 0.25, (1 - half) / 4, 0.0, 0.0]
    seen = values(lambda o: CosineRestartLR(o, periods=[2, 4], restart_weights=[1, 0.5], eta_min=0.0), 8)
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "decay"), [("linear", [0.6, 0.2]), ("cosine", [0.6, 0.2]), ("sqrt", [1 - 0.8 * 0.5**0.5, 0.2])]
)
def test_warm_up_stable_decay_has_three_phases(shape: str, decay: list[float]) -> None:
    """The schedule warms up for two positions, is constant for four, and decays to the floor in two."""
    seen = values(
        lambda o: WarmupStableDecayLR(o, decay=2, warmup=2, start_factor=0.0, shape=shape, eta_min_ratio=0.2, end=8), 10
    )
    # The warm-up also starts from the floor: 0.2 + 0.8 * (0, 1/2).
    assert seen == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0, 1.0, *decay, 0.2, 0.2])


def test_a_range_with_one_position_reaches_its_end() -> None:
    """A warm-up over one position ends at the full learning rate."""
    assert values(lambda o: LinearLR(o, start_factor=0.1, end=1), 3) == [1.0, 1.0, 1.0]
    assert values(lambda o: ConstantLR(o, factor=0.1, end=1), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda o: LinearLR(o, start_factor=1.5), "start_factor must be between 0 and 1"),
        (lambda o: ConstantLR(o, factor=-0.1), "factor must be between 0 and 1"),
        (lambda o: StepLR(o, 0), "step_size must be positive"),
        (lambda o: CosineAnnealingLR(o, eta_min=0.1, eta_min_ratio=0.1), "Specify only one of them"),
        (lambda o: CosineRestartLR(o, periods=[2]), "requires a minimum"),
        (lambda o: CosineRestartLR(o, periods=[2, 2], eta_min=0), "same length"),
        (lambda o: OneCycleLR(o, eta_max=1.0, anneal_strategy="cosine"), '"cos" or "linear"'),
        (lambda o: WarmupStableDecayLR(o, decay=2, shape="square"), "Unknown shape"),
    ],
)
def test_invalid_curves_are_rejected(make: Callable[[Optimizer], ParamScheduler], text: str) -> None:
    """Invalid numbers raise errors at construction."""
    with pytest.raises(ConfigValueError, match=text):
        make(optimizer())
