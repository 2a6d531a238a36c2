"""Runs of a model with BatchNorm under an engine: synchronized buffers, and statistics of averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.train import EMAHook
from tests.strategies import test_synced_buffers as synced
from tests.support.ranks import Ranks
from tests.train import test_update_bn as averaged


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function without the warnings that the engines cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def require_synced_buffers(two: Ranks, folder: Path, strategy: Mapping[str, Any], source: str) -> None:
    """Require that both ranks log the metric of the checkpoint, and that evaluation does not change the training."""
    options = {**strategy, "buffers": source}
    found = two.run(quiet, synced.train, str(folder), options)
    without = two.run(quiet, synced.train, str(folder / "without"), options, interval=0)
    resumed = two.run(quiet, synced.train, str(folder / "resumed"), options, resume=str(folder / "iter_8"))
    for rank in range(2):
        assert found[rank][0] == found[0][0]
        assert synced.same(found[rank][1], without[rank][1])
        kept = [
            [{name: value for name, value in each.items() if "cache" not in name} for each in run[rank][1]]
            for run in (found, resumed)
        ]
        assert synced.same(kept[0][8:], kept[1])
    for iteration in (4, 12):
        alone = synced.evaluate_alone(folder / "alone", folder / f"iter_{iteration}")
        assert alone == pytest.approx(found[0][0][iteration], rel=1e-5)


def require_recomputed_statistics(two: Ranks, folder: Path, strategy: Mapping[str, Any]) -> None:
    """Require the statistics of torch's ``update_bn`` over the batches of both ranks, and the logged metric."""
    found = two.run(quiet, averaged.train, str(folder), dict(strategy), hook={"update_bn": True})
    expected = averaged.by_hand(found[0][2], found[0][3], parts=2)
    for metrics, _, _, _, statistics in found:
        assert metrics == found[0][0]
        for key in averaged.STATISTICS:
            assert torch.allclose(statistics[f"body.0.0.{key}"], getattr(expected, key), atol=1e-6)
    alone = averaged.runner(
        str(folder / "alone"), None, model=averaged.Dropping(), custom_hooks=[EMAHook()], load_from=folder / "iter_12"
    )
    assert alone.val()["meansquarederror"] == pytest.approx(found[0][0][12], rel=1e-5)
    alone.close()
