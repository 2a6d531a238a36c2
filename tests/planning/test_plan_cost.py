"""Planning a large model neither allocates its tensors nor repeats work for several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stratagem
from stratagem import SupervisedModel
from stratagem.optim import probe

BATCH = (torch.zeros(2, 4), torch.zeros(2, 4))
ADAMW = {"optimizer": {"type": "AdamW"}}


def test_trial_updates_of_a_plan_are_small_at_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1,024 ranks, the trial updates of an optimizer have no tensor with more than 1,000 elements."""
    sizes: list[int] = []
    before = probe._trial

    def trial(optimizer: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.extend(each.numel() for some in tensors for each in some)
        return before(optimizer, tensors, *args, **kwargs)

    monkeypatch.setattr(probe, "_trial", trial)
    network = nn.Sequential(nn.Linear(4, 3000), nn.Linear(3000, 4))
    model = SupervisedModel(network, nn.MSELoss())
    [step] = stratagem.plan(model, optim_wrapper=ADAMW, batch=BATCH, strategies=["fsdp"], worlds=[1024]).steps
    assert step.failure is None
    assert sizes
    assert max(sizes) <= 1000
