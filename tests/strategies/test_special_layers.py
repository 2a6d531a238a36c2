"""Layers with hooks, parametrizations or empty parameters train as in one process, or are rejected with their name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.model import convert_sync_batchnorm, revert_sync_batchnorm
from tests.support.ranks import Ranks
from tests.support.special_layers import COMPUTED, KINDS, PLAN, all_losses

SINGLE = {"type": "SingleDeviceStrategy"}
TP = {"type": "FSDPStrategy", "tp": 2, "tp_plan": PLAN}


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        ({"type": "DDPStrategy"}, [*KINDS, "spectral norm"]),
        ({"type": "FSDPStrategy"}, [*KINDS, "spectral norm"]),
        (TP, [kind for kind in KINDS if kind not in COMPUTED]),
    ],
)
def test_special_layers_train_as_in_one_process(
    ranks: Ranks, tmp_path: Path, strategy: dict[str, Any], kinds: list[str]
) -> None:
    """The losses equal those of a single process. Every kind of layer affects the losses, except empty parameters."""
    expected = all_losses(SINGLE, str(tmp_path), [*kinds, "plain"])
    for found in ranks.run(all_losses, strategy, str(tmp_path), kinds):
        for kind in kinds:
            assert found[kind] == pytest.approx(expected[kind], rel=1e-5), kind
    assert all(expected[kind] != expected["plain"] for kind in kinds if "hook" in kind)


def test_a_layer_with_a_computed_weight_cannot_be_sharded(ranks: Ranks, tmp_path: Path) -> None:
    """A tensor-parallel plan rejects such a layer by its name, instead of failing with an internal error of torch."""
    names = {"weight norm": "_WeightNorm", "old weight norm": "WeightNorm", "spectral norm": "_SpectralNorm"}
    for found in ranks.run(all_losses, TP, str(tmp_path), COMPUTED):
        for kind in COMPUTED:
            assert f"tp_plan: 'up' computes its weight with {names[kind]}" in found[kind]


def test_hooks_survive_the_conversion_to_sync_batch_norm() -> None:
    """Hooks of a BatchNorm layer are called after its conversion to SyncBatchNorm and back."""
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[1].register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    model[1].register_full_backward_hook(lambda module, before, after: calls.append("backward"))
    samples = torch.randn(4, 2)
    expected = model(samples)
    converted = convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    plain, _ = revert_sync_batchnorm(converted)
    torch.testing.assert_close(plain(samples), expected)
    plain(samples).sum().backward()
    assert calls == ["before"] * 3 + ["backward"]
