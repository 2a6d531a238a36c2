"""Schedules keep the ratios between parameter groups, and accept a list with a value per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from stratagem.errors import ConfigValueError
from stratagem.optim import (
    CosineAnnealingLR,
    CosineAnnealingMomentum,
    CosineAnnealingParamScheduler,
    CosineRestartLR,
    LinearLR,
    OneCycleLR,
    OneCycleParamScheduler,
    OptimWrapper,
    PolyLR,
    ReduceOnPlateauLR,
    WarmupStableDecayLR,
    build_optim_wrapper,
)
from stratagem.strategies.setup.building import scale_lr

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: OneCycleLR(o, eta_max=0.3, total_steps=8),
    "one cycle with three phases": lambda o: OneCycleLR(o, eta_max=0.3, total_steps=8, three_phase=True),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6, eta_min=0.02),
    "restarts": lambda o: CosineRestartLR(o, periods=[3, 5], restart_weights=[1.0, 0.5], eta_min=0.02),
    "polynomial": lambda o: PolyLR(o, eta_min=0.02, end=6),
    "warm-up, stable, decay": lambda o: WarmupStableDecayLR(o, decay=3, warmup=2, eta_min=0.02, end=8),
    "linear": lambda o: LinearLR(o, end=6),
    "plateau": lambda o: ReduceOnPlateauLR(o, patience=0, factor=0.5, min_value=0.03, eps=1e-3),
}


def groups(*rates: float, default: float = 0.1) -> SGD:
    """Return an optimizer with a group for each learning rate."""
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=default, momentum=0.9)


def course(optim: Optimizer, make: Callable[[Any], Any], steps: int = 8) -> list[list[float]]:
    """Return the learning rates of all groups at each position."""
    schedule = make(optim)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optim.param_groups])
        # A metric that never improves, for the plateau.
        schedule.step({"loss": 1.0}) if isinstance(schedule, ReduceOnPlateauLR) else schedule.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_ratios_to_the_default_learning_rate(name: str) -> None:
    """Groups with 0.1 and 10 times the default learning rate keep these ratios, and a frozen group stays at 0."""
    alone = course(groups(0.1), SCHEDULES[name])
    seen = course(groups(0.1, 0.01, 1.0, 0.0), SCHEDULES[name])
    assert len({rate for (rate,) in alone}) > 1
    for (rate,), rates in zip(alone, seen, strict=True):
        assert rates[0] == rate
        assert rates == pytest.approx([rate, 0.1 * rate, 10 * rate, 0.0], abs=1e-12)


def test_a_schedule_of_the_momentum_keeps_the_ratios_of_the_groups() -> None:
    """``betas[0]`` of a group with half the momentum stays at half the scheduled value, down to half of ``eta_min``."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optim = Adam([{"params": parameters[:1]}, {"params": parameters[1:], "betas": (0.4, 0.999)}], betas=(0.8, 0.999))
    schedule = CosineAnnealingMomentum(optim, T_max=2, eta_min=0.2)
    schedule.step(2)
    assert [group["betas"][0] for group in optim.param_groups] == pytest.approx([0.2, 0.1])


def test_groups_without_weight_decay_stay_without() -> None:
    """A schedule that increases the weight decay to 0.3 does not change a group whose weight decay is 0."""
    optim = groups(0.1, 0.1)
    optim.param_groups[0]["weight_decay"] = 0.1
    schedule = CosineAnnealingParamScheduler(optim, "weight_decay", T_max=2, eta_min=0.3)
    schedule.step(2)
    assert [group["weight_decay"] for group in optim.param_groups] == pytest.approx([0.3, 0.0])


def test_an_option_without_a_value_gets_that_of_the_schedule() -> None:
    """If neither the optimizer nor a group has a weight decay, there is no ratio to keep."""
    optim = groups(0.1, 0.2)
    OneCycleParamScheduler(optim, "weight_decay", eta_max=1.0, div_factor=4.0, total_steps=8)
    assert [group["weight_decay"] for group in optim.param_groups] == [0.25, 0.25]


def test_without_a_group_with_the_default_the_largest_is_the_reference() -> None:
    """If all groups of an optimizer object have their own learning rates, the largest follows ``eta_max``."""
    seen = course(groups(0.4, 0.2, default=0.001), lambda o: OneCycleLR(o, eta_max=1.0, div_factor=10.0, total_steps=8))
    assert seen[0] == pytest.approx([0.1, 0.05])


def test_multipliers_of_a_configuration_refer_to_its_learning_rate() -> None:
    """``lr_mult`` applies to ``eta_max`` even if every group has a multiplier, and after the rate was scaled."""
    model = nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    rules = {"custom_keys": {"body": {"lr_mult": 0.1}, "head": {"lr_mult": 10.0}}}
    cfg = {"optimizer": {"type": "SGD", "lr": 0.5}, "paramwise_cfg": rules}
    optim = build_optim_wrapper(model, cfg)
    assert isinstance(optim, OptimWrapper)
    scale_lr(optim, base_batch=1, real_batch=4)
    OneCycleLR(optim, eta_max=1.0, div_factor=1.0, total_steps=8)
    assert optim.get_lr()["lr"] == pytest.approx([0.1, 10.0])


def test_all_groups_frozen_stay_frozen() -> None:
    """A one-cycle schedule does not unfreeze an optimizer whose groups all have the learning rate 0."""
    assert course(groups(0.0, 0.0), SCHEDULES["one cycle"]) == [[0.0, 0.0]] * 8


def test_ratios_survive_a_resume_with_another_configured_rate() -> None:
    """The rates continue as saved if the configuration now has twice the learning rate."""
    make = SCHEDULES["one cycle"]
    saved, resumed = groups(0.1, 0.01), groups(0.2, 0.02, default=0.2)
    schedule, later = make(saved), make(resumed)
    schedule.step(3)
    resumed.load_state_dict(saved.state_dict())
    later.load_state_dict(schedule.state_dict())
    schedule.step()
    later.step()
    expected = [group["lr"] for group in saved.param_groups]
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx(expected)


PER_GROUP: dict[str, tuple[Callable[[Any, Sequence[float]], Any], int, list[float]]] = {
    # The position at which the values of the list are reached.
    "eta_max": (lambda o, values: OneCycleLR(o, eta_max=values, pct_start=0.25, total_steps=8), 1, [0.3, 0.2]),
    "cosine": (lambda o, values: CosineAnnealingLR(o, T_max=4, eta_min=values), 4, [0.05, 0.0]),
    "polynomial": (lambda o, values: PolyLR(o, eta_min=values, end=4), 3, [0.05, 0.01]),
    "restarts": (lambda o, values: CosineRestartLR(o, periods=[3], eta_min=values), 3, [0.05, 0.01]),
    "plateau": (lambda o, values: ReduceOnPlateauLR(o, patience=0, factor=0.01, min_value=values), 3, [0.05, 0.02]),
}


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_list_has_a_value_for_each_group(name: str) -> None:
    """Each group reaches its value in the list, regardless of the ratios between the groups."""
    make, position, expected = PER_GROUP[name]
    assert course(groups(0.1, 0.2), lambda o: make(o, expected), 6)[position] == pytest.approx(expected)


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_list_of_the_wrong_length_is_rejected(name: str) -> None:
    """The error contains the length of the list and the number of groups."""
    make = PER_GROUP[name][0]
    with pytest.raises(ConfigValueError, match="has 3 values, but the optimizer has 2 parameter groups"):
        make(groups(0.1, 0.2), [0.1, 0.2, 0.3])


def test_one_cycle_with_a_list_equals_torch() -> None:
    """A list of maxima gives the rates of torch's ``OneCycleLR`` with ``max_lr=[...]``."""
    ours, theirs = groups(0.1, 0.2), groups(0.1, 0.2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, [0.3, 0.7], total_steps=8, cycle_momentum=False)
    seen = course(ours, lambda o: OneCycleLR(o, eta_max=[0.3, 0.7], total_steps=8))
    for rates in seen:
        assert rates == pytest.approx([group["lr"] for group in theirs.param_groups])
        theirs.step()
        if rates is not seen[-1]:
            schedule.step()


def test_a_group_that_was_added_later_needs_a_single_value() -> None:
    """The error of the next step explains that the list has no value for the added group."""
    optim = groups(0.1, 0.2)
    schedule = OneCycleLR(optim, eta_max=[0.3, 0.7], total_steps=8)
    optim.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigValueError, match=r"group 2 was added .* a list of 2 values"):
        schedule.step()
