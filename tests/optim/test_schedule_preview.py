"""Previewing schedules without training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from stratagem.errors import ConfigValueError
from stratagem.optim import LinearLR, OptimWrapper, ReduceOnPlateauLR, StepLR, StepMomentum, preview_schedules


def wrapper(**options: int) -> OptimWrapper:
    """Return a wrapper with one parameter and a learning rate of 1."""
    return OptimWrapper(SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.8), **options)


def test_values_match_those_used_in_training() -> None:
    """The preview combines an iteration-based warm-up and a decay after each epoch of three iterations."""
    optim = wrapper()
    schedules = [LinearLR(optim, start_factor=0.5, end=3, by_epoch=False), StepLR(optim, 1, gamma=0.1)]
    shown = preview_schedules(optim, schedules, range(7), epoch_length=3)
    np.testing.assert_allclose(shown["lr"][:, 0], [0.5, 0.75, 1.0, 0.1, 0.1, 0.1, 0.01])
    assert shown["momentum"].shape == shown["weight_decay"].shape == (7, 1)


def test_values_change_when_the_optimizer_updates() -> None:
    """With two micro-batches per update, iteration-based schedules advance by two, step-based ones by one."""
    optim = wrapper(accumulative_counts=2)
    by_iteration = StepLR(optim, 2, gamma=0.5, by_epoch=False)
    by_step = StepMomentum(optim, 2, gamma=0.5, by="step")
    shown = preview_schedules(optim, [by_iteration, by_step], range(6))
    np.testing.assert_allclose(shown["lr"][:, 0], [1.0, 1.0, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(shown["momentum"][:, 0], [0.8, 0.8, 0.8, 0.8, 0.4, 0.4])


def test_the_preview_does_not_change_the_run() -> None:
    """The preview does not change learning rates and positions."""
    optim = wrapper()
    schedule = StepLR(optim, 1, gamma=0.5)
    schedule.step()
    before = schedule.state_dict()
    preview_schedules(optim, [schedule], [0, 100, 1000], epoch_length=10)
    assert optim.get_lr() == {"lr": [0.5]}
    assert schedule.state_dict() == before
    assert schedule.position == 1


def test_every_group_is_shown() -> None:
    """Each group has a column, and a schedule that depends on metrics is constant."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)]
    optim = OptimWrapper(AdamW(groups, betas=(0.7, 0.9)))
    shown = preview_schedules(optim, [ReduceOnPlateauLR(optim)], [0, 5])
    np.testing.assert_allclose(shown["lr"], [[1.0, 0.1]] * 2)
    np.testing.assert_allclose(shown["momentum"], [[0.7, 0.7]] * 2)


def test_epoch_schedules_require_the_length_of_an_epoch() -> None:
    """An epoch-based schedule requires ``epoch_length``."""
    optim = wrapper()
    with pytest.raises(ConfigValueError, match="epoch_length"):
        preview_schedules(optim, [StepLR(optim, 1)], [0])
