"""Schedules continue after their state went through a checkpoint, which contains plain containers only."""

from __future__ import annotations

import torch

from stratagem.compat.mmengine.optim import MultiStepLR


def schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return optimizer, MultiStepLR(optimizer, milestones=[2, 2, 4], gamma=0.5)


def test_a_multi_step_schedule_resumes_before_a_milestone():
    """The milestones are a dict in a checkpoint, and positions that are not in it do not change the value."""
    optimizer, scheduler = schedule()
    state = {**scheduler.state_dict(), "milestones": {2: 2, 4: 1}}
    scheduler.load_state_dict(state)
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.25, 0.25, 0.125]
