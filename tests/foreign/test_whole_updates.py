"""Optimizers of pytorch-optimizer that read whole parameters have the same bits under FSDP as in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.given_gradients import by_hand, updated
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SOAP": {},
    "Shampoo": {},
    "ScalableShampoo": {"start_preconditioning_step": 2},
    "Lamb": {},
    "LARS": {},
    "AdaFactor": {},
    "CAME": {},
    "Prodigy": {},
}


def optimizer_of(name: str) -> Any:
    """Return an optimizer class of pytorch-optimizer, which is installed only where the jobs run."""
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)


def all_updated(folder: str) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Return the parameters after updates with given gradients, for each optimizer and form."""
    return {
        (name, form): updated(folder, optimizer_of(name), options, bias=True, matrix_updates=form)[0]
        for name, options in OPTIMIZERS.items()
        for form in ("owned", "gathered")
    }


def test_optimizers_of_whole_parameters_have_the_same_bits_under_fsdp(ranks: Ranks, tmp_path: Path) -> None:
    """With equal gradients, all parameters on two ranks are bitwise equal to those of the optimizer in a single process."""
    expected = {name: by_hand(optimizer_of(name), options, bias=True)[0] for name, options in OPTIMIZERS.items()}
    for found in ranks.run_within(300, all_updated, str(tmp_path)):
        for (name, form), weights in found.items():
            for key, value in expected[name].items():
                assert torch.equal(weights[key], value), (name, form, key)
