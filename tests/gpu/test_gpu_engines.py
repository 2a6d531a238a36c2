"""DeepSpeed and ColossalAI on GPUs, where they are installed: two ranks train like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.devices import ON_CPU, require_gpus, require_package
from tests.gpu.test_gpu_ranks import lenient, on_cpu
from tests.support.ranks import Ranks
from tests.support.sharded_runs import trained
from tests.support.training_loop import iterations

# As for DDP and FSDP; 16-bit training has a tolerance of its own.
TOLERANCE = 1e-4


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, Any]:
    """The results of one process on one device."""
    torch.manual_seed(0)
    found: dict[str, Any] = on_cpu(trained("single", str(tmp_path / "single")))
    return found


@pytest.fixture
def deepspeed_ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two ranks with DeepSpeed."""
    return _engine_ranks(request, "deepspeed")


@pytest.fixture
def colossalai_ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two ranks with ColossalAI."""
    return _engine_ranks(request, "colossalai")


def _engine_ranks(request: pytest.FixtureRequest, package: str) -> Ranks:
    require_package(package)
    if not ON_CPU:
        require_gpus(2)
    pool: Ranks = request.getfixturevalue("two_gpus")
    return pool


def with_deepspeed(name: str, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Train with DeepSpeed; return the losses, which are averaged over the ranks."""
    from tests.engines.deepspeed.engine_runs import go, placed

    return go(placed(name, **changes), Path(folder))


def with_colossalai(name: str, folder: str) -> dict[str, Any]:
    """Train with a plugin of ColossalAI; return the losses, averaged over the ranks."""
    from tests.engines.colossalai.boosted_runs import prepared
    from tests.support.sharded_runs import EPOCH, GLOBAL_BATCH, Sentences

    strategy = prepared(name, folder)
    try:
        steps = iterations(strategy, Sentences(), 0, EPOCH, global_batch=GLOBAL_BATCH)
        return {"losses": [step.mean_loss for step in steps]}
    finally:
        strategy.close()


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_deepspeed_trains_like_one_process(
    name: str, deepspeed_ranks: Ranks, alone: dict[str, Any], tmp_path: Path
) -> None:
    """The losses of every ZeRO stage equal those of one process nearly."""
    for rank in deepspeed_ranks.run_within(240, lenient, with_deepspeed, name, str(tmp_path), {}):
        assert rank["losses"] == pytest.approx(alone["losses"], abs=TOLERANCE)


def test_deepspeed_trains_in_bfloat16(deepspeed_ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """With bf16, the losses equal those of float32 to the precision of bfloat16."""
    changes = {"bf16": {"enabled": True}}
    for rank in deepspeed_ranks.run_within(240, lenient, with_deepspeed, "ZeRO-2", str(tmp_path), changes):
        assert rank["losses"] == pytest.approx(alone["losses"], abs=3 * 2**-7)


@pytest.mark.parametrize("name", ["torch-ddp", "zero 1", "zero 2"])
def test_colossalai_trains_like_one_process(
    name: str, colossalai_ranks: Ranks, alone: dict[str, Any], tmp_path: Path
) -> None:
    """The losses of every plugin that this package supports equal those of one process nearly."""
    for rank in colossalai_ranks.run_within(240, lenient, with_colossalai, name, str(tmp_path)):
        assert rank["losses"] == pytest.approx(alone["losses"], abs=TOLERANCE)
