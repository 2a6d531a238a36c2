"""Schedules that depend on metrics."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import ReduceOnPlateauLR, ReduceOnPlateauMomentum, StepLR

METRICS = [1.0, 0.9, 0.95, 0.91, 0.92, 0.93, 0.5, 0.5, 0.5, 0.51, 0.52, 0.4, 0.41, 0.42, 0.43, 0.44]


def optimizer(**options: object) -> SGD:
    """Return an optimizer with one parameter."""
    return SGD([nn.Parameter(torch.zeros(1))], lr=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["less", "greater"])
@pytest.mark.parametrize("threshold_rule", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_it_matches_torch(rule: str, threshold_rule: str, cooldown: int) -> None:
    """For the same metrics, the learning rates match those of torch's ReduceLROnPlateau."""
    ours, theirs = optimizer(), optimizer()
    schedule = ReduceOnPlateauLR(
        ours, monitor="m", rule=rule, factor=0.5, patience=1, threshold=0.05, threshold_rule=threshold_rule,
        cooldown=cooldown, min_value=0.01,
    )  # fmt: skip
    reference = lr_scheduler.ReduceLROnPlateau(
        theirs, mode={"less": "min", "greater": "max"}[rule], factor=0.5, patience=1, threshold=0.05,
        threshold_mode=threshold_rule, cooldown=cooldown, min_lr=0.01,
    )  # fmt: skip
    for metric in METRICS:
        schedule.step({"m": torch.tensor(metric)})
        reference.step(torch.tensor(metric).item())
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])


def test_it_does_not_go_below_the_minimum() -> None:
    """The learning rate is not reduced below ``min_value``."""
    optim = optimizer()
    schedule = ReduceOnPlateauLR(optim, patience=0, min_value=0.3)
    for _ in range(3):
        schedule.step({"loss": 1.0})
    assert optim.param_groups[0]["lr"] == 0.3


def test_it_ignores_metrics_outside_its_range() -> None:
    """Metrics before the begin of the range are ignored."""
    optim = optimizer()
    schedule = ReduceOnPlateauLR(optim, patience=0, begin=4)
    for _ in range(3):
        schedule.step({"loss": 1.0})
    assert optim.param_groups[0]["lr"] == 1.0


def test_a_step_without_metrics_only_advances_the_position() -> None:
    """A step without metrics, after an epoch without validation, only advances the position."""
    schedule = ReduceOnPlateauLR(optimizer(), patience=0)
    for _ in range(3):
        schedule.step()
    assert schedule.position == 3
    assert schedule.best is None


def test_it_is_part_of_the_chain() -> None:
    """The reduction and another schedule of the same learning rate are multiplied."""
    optim = optimizer()
    plateau, steps = ReduceOnPlateauLR(optim, patience=0, factor=0.5), StepLR(optim, 1, gamma=0.1)
    plateau.step({"loss": 1.0})
    plateau.step({"loss": 1.0})
    steps.step()
    assert optim.param_groups[0]["lr"] == pytest.approx(0.05)


def test_momentum_can_be_reduced() -> None:
    """The momentum can be reduced in the same way."""
    optim = optimizer(momentum=0.8)
    schedule = ReduceOnPlateauMomentum(optim, patience=0, factor=0.5)
    schedule.step({"loss": 1.0})
    schedule.step({"loss": 1.0})
    assert optim.param_groups[0]["momentum"] == 0.4


def test_state_round_trips_through_json() -> None:
    """A resumed schedule reduces the rate at the same time as an uninterrupted one."""
    one, other = optimizer(), optimizer()
    first = ReduceOnPlateauLR(one, monitor="m", patience=1, factor=0.5)
    for metric in METRICS[:6]:
        first.step({"m": metric})
    second = ReduceOnPlateauLR(other, monitor="m", patience=1, factor=0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for metric in METRICS[6:]:
        first.step({"m": metric})
        second.step({"m": metric})
        assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_invalid_arguments_are_rejected() -> None:
    """Invalid metrics, units, settings and states raise errors with the valid alternatives."""
    schedule = ReduceOnPlateauLR(optimizer(), monitor="accuracy")
    with pytest.raises(ConfigTypeError, match="must be a mapping"):
        schedule.step(0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigKeyError, match="Did you mean 'acuracy'"):
        schedule.step({"acuracy": 0.5})
    with pytest.raises(ConfigValueError, match="must be epoch-based"):
        ReduceOnPlateauLR(optimizer(), by_epoch=False)
    with pytest.raises(ConfigValueError, match="factor must be smaller than 1"):
        ReduceOnPlateauLR(optimizer(), factor=1.0)
    with pytest.raises(CheckpointMismatchError, match="has no best"):
        schedule.load_state_dict(StepLR(optimizer(), 1).state_dict())


def test_it_requests_metrics() -> None:
    """``need_val_args`` tells the loop to step the schedule after validation."""
    assert ReduceOnPlateauLR.need_val_args
    assert not StepLR.need_val_args
