"""Training with DeepSpeed gives the same results as training in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.deepspeed.engine_runs import FP32, go, placed
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed


@pytest.mark.parametrize("name", FP32)
def test_every_zero_stage_matches_a_single_process(two: Ranks, single: dict[str, Any], folder: Path, name: str) -> None:
    """Losses, gradient norms, and learning rates equal those of one process up to float32 rounding."""
    seen = two.run(go, placed(name), folder)[0]
    assert seen["losses"] == pytest.approx(single["losses"], rel=2e-5)
    assert seen["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert seen["rates"] == single["rates"]
    assert seen["updates"] == seen["attempts"] == 6


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-3"])
def test_four_ranks_match_a_single_process(four: Ranks, single: dict[str, Any], folder: Path, name: str) -> None:
    """Results do not depend on the number of ranks."""
    seen = four.run(go, placed(name), folder)[0]
    assert seen["losses"] == pytest.approx(single["losses"], rel=2e-5)
