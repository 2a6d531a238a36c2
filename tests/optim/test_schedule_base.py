"""Ranges, chains, units and state of schedules."""

from __future__ import annotations

import cProfile
import inspect
import json
import pstats

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import (
    CosineAnnealingLR,
    CosineAnnealingParamScheduler,
    ExponentialLR,
    LinearLR,
    LinearMomentum,
    MultiStepLR,
    OptimWrapper,
    OptimWrapperDict,
    ParamScheduler,
    StepLR,
    StepMomentum,
)


def optimizer(lr: float = 1.0, **options: object) -> SGD:
    """Return an optimizer with one parameter."""
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr, **options)  # type: ignore[arg-type]


def rates(optim: Optimizer, schedules: list[ParamScheduler], count: int) -> list[float]:
    """Return the learning rate at each of the next positions."""
    seen = []
    for _ in range(count):
        seen.append(optim.param_groups[0]["lr"])
        for schedule in schedules:
            schedule.step()
    return seen


def test_schedules_with_disjoint_ranges() -> None:
    """A warm-up over [0, 3) is followed by a decay; positions are relative to the beginning of each schedule."""
    optim = optimizer()
    schedules = [LinearLR(optim, start_factor=0.5, end=3), ExponentialLR(optim, 0.5, begin=3)]
    assert rates(optim, schedules, 6) == [0.5, 0.75, 1.0, 1.0, 0.5, 0.25]


def test_schedules_with_the_same_range_multiply() -> None:
    """Schedules with the same range are multiplied: 0.5 from the line times 0.9 to the power of the position."""
    optim = optimizer()
    schedules = [LinearLR(optim, start_factor=0.5, end=3), ExponentialLR(optim, 0.9)]
    assert rates(optim, schedules, 4) == pytest.approx([0.5, 0.75 * 0.9, 0.81, 0.729])


def test_the_order_of_stepping_does_not_matter() -> None:
    """A chain is computed in the order of construction, regardless of the order of ``step`` calls."""
    one, other = optimizer(), optimizer()
    first = [LinearLR(one, start_factor=0.5, end=3), CosineAnnealingLR(one, T_max=4, eta_min=0.2)]
    second = [LinearLR(other, start_factor=0.5, end=3), CosineAnnealingLR(other, T_max=4, eta_min=0.2)]
    assert rates(one, first, 5) == rates(other, second[::-1], 5)


def test_a_schedule_keeps_its_last_value_after_its_range() -> None:
    """After the end of its range, a schedule keeps its last value."""
    optim = optimizer()
    assert rates(optim, [StepLR(optim, 1, gamma=0.5, end=3)], 6) == [1.0, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_a_factor_of_zero_can_be_left_again() -> None:
    """A schedule recovers from a factor of zero, because values are computed from the initial one."""
    optim = optimizer()
    assert rates(optim, [LinearLR(optim, start_factor=0.0, end=3)], 3) == [0.0, 0.5, 1.0]


def test_each_group_starts_from_its_initial_value() -> None:
    """Groups keep the ratio of their learning rates."""
    optim = SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)], lr=1.0)
    schedule = StepLR(optim, 1, gamma=0.5)
    schedule.step()
    assert schedule.get_last_value() == [0.5, 0.05]


def test_a_later_group_starts_from_its_initial_value() -> None:
    """A group that is added later is scheduled from its own initial value."""
    optim = optimizer()
    schedule = StepLR(optim, 1, gamma=0.5)
    optim.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4})
    schedule.step()
    assert schedule.get_last_value() == [0.5, 0.2]


def test_a_step_may_advance_several_positions() -> None:
    """An update that consumed four iterations advances an iteration-based schedule by four."""
    optim = optimizer()
    schedule = MultiStepLR(optim, [3, 7], gamma=0.1, by_epoch=False)
    schedule.step(4)
    assert optim.param_groups[0]["lr"] == pytest.approx(0.1)
    assert schedule.last_step == 4
    schedule.step(4)
    assert optim.param_groups[0]["lr"] == pytest.approx(0.01)


def test_momentum_is_the_first_beta() -> None:
    """Momentum schedules of optimizers with betas change betas[0] only."""
    optim = Adam([nn.Parameter(torch.zeros(1))], betas=(0.8, 0.99))
    schedule = StepMomentum(optim, 1, gamma=0.5)
    schedule.step()
    assert optim.param_groups[0]["betas"] == (0.4, 0.99)


def test_momentum_of_an_optimizer_without_momentum_is_rejected() -> None:
    """Scheduling the momentum of an optimizer without momentum or betas raises an error."""
    with pytest.raises(ConfigValueError, match="neither momentum nor betas"):
        LinearMomentum(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]))


def test_any_option_of_the_groups_can_be_scheduled() -> None:
    """Any option can be scheduled, here weight decay: 0.1 + 0.3 * (1 + cos(90 degrees)) / 2 halfway."""
    optim = AdamW([nn.Parameter(torch.zeros(1))], weight_decay=0.4)
    schedule = CosineAnnealingParamScheduler(optim, "weight_decay", T_max=4, eta_min=0.1)
    schedule.step(2)
    assert optim.param_groups[0]["weight_decay"] == pytest.approx(0.25)


def test_an_unknown_option_is_rejected() -> None:
    """An unknown option raises an error with the closest name."""
    with pytest.raises(ConfigKeyError, match="'weight_decay'"):
        CosineAnnealingParamScheduler(optimizer(), "weight_decai", T_max=4)


def test_a_tensor_learning_rate_is_updated_in_place() -> None:
    """A learning rate that is a tensor is updated in place, as compiled and captured optimizers require."""
    rate = torch.tensor(1.0)
    optim = Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = StepLR(optim, 1, gamma=0.5)
    schedule.step()
    assert optim.param_groups[0]["lr"].item() == 0.5
    assert isinstance(optim.param_groups[0]["initial_lr"], float)


def test_the_step_of_the_optimizer_is_not_replaced() -> None:
    """A schedule does not patch ``optimizer.step``."""
    optim = optimizer()
    StepLR(optim, 1)
    assert "step" not in vars(optim)


def test_a_wrapper_and_its_optimizer_share_one_chain() -> None:
    """Schedules of a wrapper and of its optimizer form one chain."""
    optim = optimizer()
    schedules = [StepLR(OptimWrapper(optim), 1, gamma=0.5), StepLR(optim, 1, gamma=0.1)]
    assert rates(optim, schedules, 2) == pytest.approx([1.0, 0.05])


def test_state_round_trips_through_json() -> None:
    """A new chain that loads the saved state gives exactly the same later values."""
    one, other = optimizer(0.3), optimizer(0.3)

    def build(optim: Optimizer) -> list[ParamScheduler]:
        return [LinearLR(optim, start_factor=0.1, end=5), CosineAnnealingLR(optim, begin=5, end=20, eta_min=0.01)]

    first = build(one)
    rates(one, first, 7)
    states = json.loads(json.dumps([schedule.state_dict() for schedule in first], allow_nan=False))
    second = build(other)
    for schedule, state in zip(second, states, strict=True):
        schedule.load_state_dict(state)
    assert rates(one, first, 15) == rates(other, second, 15)


def test_values_are_right_after_a_resume_without_the_optimizer() -> None:
    """Loading a schedule sets its value in the groups, even if the optimizer was not loaded."""
    first, second = optimizer(), optimizer()
    schedule = StepLR(first, 2, gamma=0.5)
    schedule.step(5)
    StepLR(second, 2, gamma=0.5).load_state_dict(schedule.state_dict())
    assert second.param_groups[0]["lr"] == 0.25


def test_initial_values_are_restored_with_the_optimizer() -> None:
    """The optimizer state contains initial_lr, so a scaled learning rate stays scaled after a resume."""
    first, second = optimizer(0.8), optimizer(0.1)
    schedule = StepLR(first, 1, gamma=0.5)
    schedule.step()
    resumed = StepLR(second, 1, gamma=0.5)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    assert second.param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_schedule_can_return_to_a_position_before_its_range() -> None:
    """Loading a position before the range restores the initial value, and the schedule can be entered again."""
    optim = optimizer()
    schedule = LinearLR(optim, start_factor=0.5, begin=2, end=5)
    schedule.step(2)
    assert optim.param_groups[0]["lr"] == 0.5
    schedule.load_state_dict({"_global_step": 0})
    assert optim.param_groups[0]["lr"] == 1.0
    schedule.step(2)
    assert optim.param_groups[0]["lr"] == 0.5


def test_a_resumed_schedule_keeps_the_saved_settings() -> None:
    """A resumed schedule keeps the saved range and settings, and reports differences from the configuration."""
    first, second = optimizer(), optimizer()
    short = LinearLR(first, start_factor=0.0, end=3)
    short.step()
    longer = LinearLR(second, start_factor=0.5, end=5)
    state = json.loads(json.dumps(short.state_dict()))
    assert longer.differences(state) == {"end": (3, 5), "start_factor": (0.0, 0.5)}
    longer.load_state_dict(state)
    # Halfway from 0 to 1.
    assert second.param_groups[0]["lr"] == 0.5
    assert longer.differences(state) == {}


def test_a_state_without_a_description_moves_the_configured_schedule() -> None:
    """A state with only a position, as other programs write it, moves the configured schedule."""
    optim = optimizer()
    schedule = LinearLR(optim, start_factor=0.0, end=5)
    schedule.load_state_dict({"_global_step": 1, "last_step": 1})
    assert optim.param_groups[0]["lr"] == 0.25


def test_a_different_type_of_schedule_is_rejected() -> None:
    """A state of a different type of schedule raises an error that contains the option to continue."""
    state = LinearLR(optimizer(), end=5).state_dict()
    with pytest.raises(
        CheckpointMismatchError,
        match="'LinearLR', but the scheduler of this run has 'StepLR'.*resume_param_scheduler=False",
    ):
        StepLR(optimizer(), 1).load_state_dict(state)


def test_an_unknown_state_is_rejected() -> None:
    """The error for an unknown state shows its keys."""
    with pytest.raises(CheckpointMismatchError, match="step_count"):
        StepLR(optimizer(), 1).load_state_dict({"step_count": 3})


def test_last_step_continues_a_run_without_a_state() -> None:
    """With ``last_step=1``, positions 0 and 1 are complete and the next one is 2."""
    optim = optimizer()
    optim.param_groups[0]["initial_lr"] = 2.0
    schedule = StepLR(optim, 1, gamma=0.5, last_step=1)
    assert schedule.last_step == 2
    assert optim.param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigKeyError, match="initial_lr"):
        StepLR(optimizer(), 1, last_step=1)


@pytest.mark.parametrize(
    ("options", "unit"),
    [({}, "epoch"), ({"by_epoch": False}, "iter"), ({"by": "step"}, "step"), ({"by": "iter"}, "iter")],
)
def test_the_unit_can_be_chosen(options: dict[str, object], unit: str) -> None:
    """``by_epoch`` selects epochs or iterations, and ``by`` selects any unit."""
    schedule = StepLR(optimizer(), 1, **options)
    assert schedule.unit == unit
    assert schedule.by_epoch is (unit == "epoch")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(begin=3, end=3), ConfigValueError, "is not a valid range"),
        (dict(begin=-1), ConfigValueError, "is not a valid range"),
        (dict(last_step=-2), ConfigValueError, "last_step"),
        (dict(by="iters"), ConfigValueError, "'iter'"),
        (dict(by="epoch", by_epoch=False), ConfigValueError, "conflicts with"),
        (dict(gama=0.5), ConfigTypeError, "Did you mean 'gamma'"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, object], error: type[Exception], text: str) -> None:
    """Invalid ranges, units and names raise errors at construction."""
    with pytest.raises(error, match=text):
        StepLR(optimizer(), 1, **options)


def test_a_schedule_needs_one_optimizer() -> None:
    """Several optimizers, or none, raise an error."""
    several = OptimWrapperDict(a=OptimWrapper(optimizer()))
    for wrong in (several, None, nn.Linear(1, 1)):
        with pytest.raises(ConfigTypeError, match="requires an optimizer"):
            StepLR(wrong, 1)


def test_an_epoch_schedule_can_be_converted_to_iterations() -> None:
    """Converting to iterations multiplies everything in epochs by the length of an epoch."""
    optim = optimizer()
    schedule = MultiStepLR.build_iter_from_epoch(optim, [1, 2], gamma=0.5, begin=1, end=4, epoch_length=10)
    assert (schedule.begin, schedule.end, schedule.unit) == (10, 40, "iter")
    schedule.step(10 + 19)
    assert optim.param_groups[0]["lr"] == 0.5
    schedule.step()
    assert optim.param_groups[0]["lr"] == 0.25


def test_only_epoch_schedules_can_be_converted() -> None:
    """Only epoch-based schedules can be converted, and the length of an epoch must be positive."""
    with pytest.raises(ConfigValueError, match="only an epoch-based scheduler"):
        StepLR.build_iter_from_epoch(optimizer(), 1, by_epoch=False, epoch_length=10)
    with pytest.raises(ConfigValueError, match="epoch_length"):
        StepLR.build_iter_from_epoch(optimizer(), 1, epoch_length=0)


def test_a_custom_schedule_needs_one_method() -> None:
    """A custom schedule only needs ``transform``; here, the value is halved after position 1."""

    class Half(ParamScheduler):
        def transform(self, value: float, initial: float) -> float:
            return value / 2 if self.last_step > 1 else value

    optim = optimizer()
    assert rates(optim, [Half(optim, "lr")], 4) == [1.0, 1.0, 0.5, 0.5]


def test_the_signature_contains_all_arguments() -> None:
    """The signature contains the arguments of the curve and those of every schedule."""
    names = list(inspect.signature(StepLR).parameters)
    assert names[:3] == ["optimizer", "step_size", "gamma"]
    assert {"begin", "end", "last_step", "by_epoch", "by", "verbose"} <= set(names)
    assert list(inspect.signature(CosineAnnealingParamScheduler).parameters)[:3] == [
        "optimizer", "param_name", "T_max",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "most"), [("changing", 8), ("unchanged", 4), ("over", 2), ("before", 2)])
def test_a_step_needs_few_calls(name: str, most: int) -> None:
    """A schedule step makes only a few Python calls, and even fewer outside its range."""
    schedules = {
        "changing": LinearLR(optimizer(), start_factor=0.1, end=1000),
        "unchanged": StepLR(optimizer(), 1000),
        "over": StepLR(optimizer(), 1, end=1),
        "before": StepLR(optimizer(), 1, begin=1000),
    }
    step = schedules[name].step
    profile = cProfile.Profile()
    profile.enable()
    step()
    profile.disable()
    assert pstats.Stats(profile).total_calls - 1 <= most  # type: ignore[attr-defined]  # one is disable()


def test_verbose_logs_each_change(caplog: pytest.LogCaptureFixture) -> None:
    """A verbose schedule logs the unit, the position and the values of each change."""
    with caplog.at_level("INFO", logger="stratagem"):
        schedule = StepLR(optimizer(), 2, gamma=0.5, verbose=True)
        caplog.clear()
        schedule.step()
        schedule.step()
    assert caplog.messages == ["StepLR: epoch 2, [0.5]"]
