"""Tests of the optimizer wrappers and schedules of the MMEngine layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stratagem.optim
from stratagem.compat.mmengine.config import ConfigDict
from stratagem.compat.mmengine.logging import MessageHub
from stratagem.compat.mmengine.optim import (
    AmpOptimWrapper,
    CosineAnnealingLR,
    LinearLR,
    LinearMomentum,
    MultiStepLR,
    OneCycleLR,
    OptimWrapper,
    OptimWrapperDict,
    ReduceOnPlateauLR,
    build_optim_wrapper,
)
from stratagem.compat.mmengine.registry import PARAM_SCHEDULERS


def make(**options: Any) -> tuple[nn.Parameter, OptimWrapper]:
    """Return a parameter with the value 1, and a wrapper of SGD with the learning rate 1."""
    parameter = nn.Parameter(torch.ones(1))
    return parameter, OptimWrapper(torch.optim.SGD([parameter], lr=1.0, momentum=0.5), **options)


def advance(optim: Any, schedulers: list[Any], steps: int) -> list[float]:
    """Return the learning rates of some updates."""
    rates = []
    for _ in range(steps):
        rates.append(optim.param_groups[0]["lr"])
        optim.inner_count += 1
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_the_window_at_the_end_of_a_run_is_shorter() -> None:
    """The losses of 3 micro-batches with accumulation over 2 are divided by 2, 2 and 1."""
    parameter, optim = make(accumulative_counts=2)
    optim.initialize_count_status(nn.Module(), 0, 3)
    grads: list[float] = []
    parameter.register_hook(lambda grad: grads.append(grad.item()))
    for _ in range(3):
        optim.update_params(parameter.sum())
    assert grads == [0.5, 0.5, 1.0]
    assert optim._inner_count == 3
    assert optim.num_steps_applied == 2


def test_the_gradient_norm_is_recorded_and_clipped() -> None:
    """A gradient of 4 is clipped to 2, and its norm before clipping is in the message hub."""
    parameter, optim = make(clip_grad={"max_norm": 2.0})
    optim.message_hub = MessageHub("test_the_gradient_norm")
    optim.update_params(4 * parameter.sum())
    assert parameter.item() == pytest.approx(-1.0, abs=1e-5)
    assert optim.message_hub.get_scalar("train/grad_norm").current() == 4.0


def test_a_subclass_may_override_the_step() -> None:
    """A step that a subclass defines is called, with MMEngine's private names of counts and clipping."""

    class Noisy(OptimWrapper):
        calls = 0

        def backward(self, loss: Tensor, **kwargs: Any) -> None:
            loss.backward(**kwargs)
            self._inner_count += 1

        def step(self, **kwargs: Any) -> None:
            self.calls += 1
            if self.clip_grad_kwargs:
                self._clip_grad()
            self.optimizer.step(**kwargs)

    parameter = nn.Parameter(torch.ones(1))
    clip = {"type": "value", "clip_value": 0.5}
    optim = Noisy(torch.optim.SGD([parameter], lr=1.0), accumulative_counts=2, clip_grad=clip)
    for _ in range(4):
        optim.update_params(4 * parameter.sum())
    assert optim.calls == 2
    assert parameter.item() == 0.0


def test_groups_have_an_additional_one_with_the_defaults() -> None:
    """With several groups, schedules and the state include a group with the options that the optimizer was built with."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    rules = {"custom_keys": {"0.weight": {"lr_mult": 0.1}}, "norm_decay_mult": 0.0, "bias_lr_mult": 2.0}
    optimizer = {"type": "SGD", "lr": 0.5, "weight_decay": 0.1}
    optim = build_optim_wrapper(model, {"optimizer": optimizer, "paramwise_cfg": rules})
    assert optim.get_lr() == {"base_lr": [0.5], "lr": [0.05, 1.0, 0.5, 0.5]}
    assert [group["weight_decay"] for group in optim.param_groups] == [0.1, 0.1, 0.0, 0.0, 0.1]
    scheduler = MultiStepLR(optim, milestones=[1])
    optim.inner_count += 1
    scheduler.step()
    assert optim.get_lr()["base_lr"] == [pytest.approx(0.05)]
    other = build_optim_wrapper(model, {"optimizer": optimizer, "paramwise_cfg": rules})
    other.load_state_dict(optim.state_dict())
    assert other.get_lr() == optim.get_lr()


def test_the_state_of_torch_and_of_the_wrapper_are_the_same() -> None:
    """Without accumulation and with one group, the state is that of the optimizer."""
    _, optim = make()
    assert optim.state_dict() == optim.optimizer.state_dict()


def test_mixed_precision_on_the_cpu_uses_bfloat16() -> None:
    """A loss scale for float16 has no effect on the CPU, whose default is bfloat16."""
    model = nn.Linear(1, 1)
    optim = AmpOptimWrapper(loss_scale=512.0, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with optim.optim_context(model):
        assert model(torch.ones(1, 1)).dtype is torch.bfloat16
    assert optim.loss_scaler is None


def test_the_wrappers_are_those_of_the_engine() -> None:
    """A run recognizes the wrappers of the layer, because they are subclasses of its own."""
    _, optim = make()
    several = OptimWrapperDict(a=optim)
    assert isinstance(optim, stratagem.optim.BaseOptimWrapper)
    assert isinstance(several, stratagem.optim.OptimWrapperDict)
    assert several.get_lr() == {"a.lr": [1.0]}


def test_overlapping_schedules_multiply_the_current_value() -> None:
    """A warm-up of 3 positions and a decay at position 2 change the same value one after the other."""
    _, optim = make()
    schedulers = [LinearLR(optim, start_factor=0.5, end=3), MultiStepLR(optim, milestones=[2], gamma=0.1)]
    assert advance(optim, schedulers, 4) == pytest.approx([0.5, 0.75, 0.1, 0.1])


def test_a_warm_up_may_start_from_zero() -> None:
    """With start_factor=0, the later values are computed from the initial value."""
    _, optim = make()
    assert advance(optim, [LinearLR(optim, start_factor=0.0, end=5)], 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_cosine_annealing_ends_at_the_minimum() -> None:
    """After T_max positions, the learning rate is the minimum, also for a group with another learning rate."""
    _, optim = make()
    rates = advance(optim, [CosineAnnealingLR(optim, T_max=2, eta_min=0.2)], 3)
    assert rates == pytest.approx([1.0, 0.6, 0.2])


def test_the_momentum_of_adam_is_its_first_beta() -> None:
    """A momentum schedule changes betas[0] and keeps betas[1]."""
    optim = OptimWrapper(torch.optim.Adam([nn.Parameter(torch.ones(1))], betas=(0.8, 0.99)))
    LinearMomentum(optim, start_factor=0.5, end=3)
    assert optim.param_groups[0]["betas"] == (0.4, 0.99)


def test_epochs_are_converted_to_iterations() -> None:
    """convert_to_iter_based multiplies all numbers of epochs by the length of an epoch."""
    _, optim = make()
    cfg = {"type": "MultiStepLR", "milestones": [1, 2], "end": 3, "convert_to_iter_based": True}
    scheduler = PARAM_SCHEDULERS.build(cfg, default_args={"optimizer": optim, "epoch_length": 10})
    assert (dict(scheduler.milestones), scheduler.end, scheduler.by_epoch) == ({10: 1, 20: 1}, 30, False)


def test_a_plateau_reduces_the_learning_rate() -> None:
    """The learning rate is reduced after more than ``patience`` validations without improvement."""
    _, optim = make()
    scheduler = ReduceOnPlateauLR(optim, monitor="loss", patience=1)
    rates = []
    for loss in (1.0, 1.0, 1.0, 0.5):
        scheduler.step({"loss": loss})
        rates.append(optim.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_a_schedule_resumes_from_its_state() -> None:
    """A state contains numbers and names but no functions, and a schedule with it continues at the same position."""
    _, optim = make()
    scheduler = OneCycleLR(optim, eta_max=1.0, total_steps=10)
    advance(optim, [scheduler], 4)
    state = scheduler.state_dict()
    assert not any(map(callable, state.values()))
    other = OneCycleLR(make()[1], eta_max=1.0, total_steps=10)
    other.load_state_dict(state)
    scheduler.step()
    other.step()
    assert other.get_last_value() == scheduler.get_last_value()


def test_groups_of_a_configuration_are_plain_dicts() -> None:
    """The optimizer reads its groups in each step, and reading a value of a ``ConfigDict`` takes several calls."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = {"type": "SGD", "lr": 0.1, "weight_decay": 0.5}
    wrapper = build_optim_wrapper(
        model, ConfigDict(type="OptimWrapper", optimizer=optimizer, paramwise_cfg={"norm_decay_mult": 0.0})
    )
    assert [(type(group), group["weight_decay"]) for group in wrapper.optimizer.param_groups] == [
        (dict, 0.5),
        (dict, 0.5),
        (dict, 0.0),
        (dict, 0.0),
    ]
