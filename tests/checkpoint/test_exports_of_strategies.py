"""Exports of checkpoints that were saved with sharded parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.exported_runs import TENSOR_PLAN, require_exports, trained
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


def test_exports_of_two_shards_have_the_logits_of_the_run(ranks: Ranks, tmp_path: Path) -> None:
    """FSDP: a plain state dict and a program contain the whole weights."""
    require_exports(ranks.run_within(240, trained, "FSDPStrategy", str(tmp_path)), tmp_path)


@pytest.mark.parametrize("options", [{"replicate": 2}, {"tp": 2, "tp_plan": TENSOR_PLAN}], ids=["HSDP", "FSDP and TP"])
def test_exports_of_a_two_dimensional_mesh_have_the_logits_of_the_run(
    four: Ranks, tmp_path: Path, options: dict[str, Any]
) -> None:
    """With hybrid sharding, and with tensor parallelism, a plain state dict and a program contain the whole weights."""
    parts = 2 if "tp" in options else 4
    require_exports(
        four.run_within(240, trained, {"type": "FSDPStrategy", **options}, str(tmp_path), parts=parts), tmp_path
    )
