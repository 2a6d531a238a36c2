"""Properties of accumulation windows and schedules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Optimizer

from stratagem.optim import (
    CosineRestartLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    OptimWrapper,
    ParamScheduler,
    PolyLR,
    WarmupStableDecayLR,
)
from tests.support.properties import examples

BUILDERS: list[Callable[[Optimizer, int, int], ParamScheduler]] = [
    lambda o, begin, end: LinearLR(o, start_factor=0.25, begin=begin, end=end),
    lambda o, begin, end: PolyLR(o, eta_min=0.1, power=1.5, begin=begin, end=end),
    lambda o, begin, end: MultiStepLR(o, [1, 4, 4], gamma=0.5, begin=begin, end=end),
    lambda o, begin, end: ExponentialLR(o, 0.9, begin=begin, end=end),
    lambda o, begin, end: CosineRestartLR(
        o, periods=[3, 5], restart_weights=[1, 0.5], eta_min=0.05, begin=begin, end=end
    ),
    lambda o, begin, end: OneCycleLR(o, eta_max=0.8, begin=begin, end=end),
    lambda o, begin, end: WarmupStableDecayLR(o, decay=3, warmup=2, begin=begin, end=end),
]

chains = st.lists(st.tuples(st.sampled_from(BUILDERS), st.integers(0, 8), st.integers(1, 12)), min_size=1, max_size=3)


def build(chain: list[tuple[Callable[..., ParamScheduler], int, int]]) -> tuple[SGD, list[ParamScheduler]]:
    """Return an optimizer with a learning rate of 1 and its chain of schedules, each with its begin and length."""
    optim = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return optim, [make(optim, begin, begin + length) for make, begin, length in chain]


@pytest.mark.slow
@settings(max_examples=examples(60), deadline=None)
@given(gradients=st.lists(st.integers(-8, 8), min_size=1, max_size=12), counts=st.integers(1, 5))
def test_every_update_uses_the_mean_gradient_of_its_window(gradients: list[int], counts: int) -> None:
    """Every update uses the mean gradient of its window, for any length of the run, including the last window."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    wrapper = OptimWrapper(SGD([weight], lr=1.0), accumulative_counts=counts)
    wrapper.initialize_count_status(nn.Identity(), 0, len(gradients))
    expected = 0.0
    for start in range(0, len(gradients), counts):
        window = gradients[start : start + counts]
        for gradient in window:
            wrapper.update_params((weight * gradient).sum())
        expected -= sum(window) / len(window)
        assert weight.item() == pytest.approx(expected)
    assert wrapper.num_steps_applied == math.ceil(len(gradients) / counts)


@settings(max_examples=examples(60), deadline=None)
@given(chain=chains, stop=st.integers(0, 20))
def test_a_chain_can_be_resumed_at_any_position(
    chain: list[tuple[Callable[..., ParamScheduler], int, int]], stop: int
) -> None:
    """Schedules that are resumed at any position give bit-identical values to uninterrupted ones."""
    optim, schedules = build(chain)
    for _ in range(stop):
        for schedule in schedules:
            schedule.step()
    resumed_optim, resumed = build(chain)
    for schedule, fresh in zip(schedules, resumed, strict=True):
        fresh.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for _ in range(8):
        assert resumed_optim.param_groups[0]["lr"] == optim.param_groups[0]["lr"]
        for schedule in (*schedules, *resumed):
            schedule.step()


@settings(max_examples=examples(60), deadline=None)
@given(chain=chains, jumps=st.lists(st.integers(0, 5), max_size=6))
def test_a_step_of_several_positions_equals_single_steps(
    chain: list[tuple[Callable[..., ParamScheduler], int, int]], jumps: list[int]
) -> None:
    """The value depends only on the position, not on the size of the steps."""
    optim, schedules = build(chain)
    other, single = build(chain)
    for jump in jumps:
        for schedule in schedules:
            schedule.step(jump)
        for _ in range(jump):
            for schedule in single:
                schedule.step()
        assert optim.param_groups[0]["lr"] == other.param_groups[0]["lr"]
