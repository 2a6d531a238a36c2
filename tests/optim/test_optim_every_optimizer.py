"""All optimizers of torch can be built by name and used."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.optim import BaseOptimWrapper, StepLR, build_optim_wrapper

NAMES = sorted(
    name
    for name, member in vars(torch.optim).items()
    if isinstance(member, type) and issubclass(member, Optimizer) and member is not Optimizer
)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_built_stepped_and_scheduled(name: str) -> None:
    """An optimizer that is built by name updates the weights, can be scheduled, and saves its state."""
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    model: nn.Module = nn.Embedding(4, 3, sparse=True) if sparse else nn.Linear(4, 3, bias=False)
    data = torch.arange(4) if sparse else torch.ones(2, 4)
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type=name)))
    assert isinstance(wrapper, BaseOptimWrapper)
    schedule = StepLR(wrapper, 1, gamma=0.5)
    before = next(model.parameters()).detach().clone()
    for _ in range(2):
        loss = model(data).square().mean()
        closure = partial(torch.clone, loss.detach())
        wrapper.update_params(loss, step_kwargs={"closure": closure} if name == "LBFGS" else None)
        schedule.step()
    assert not torch.equal(next(model.parameters()), before)
    assert wrapper.get_lr()["lr"] == [wrapper.param_groups[0]["initial_lr"] / 4]
    wrapper.load_state_dict(wrapper.state_dict())
