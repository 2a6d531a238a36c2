"""Folders for ``from_pretrained`` from checkpoints that four ranks saved with hybrid sharding and with tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.exported_llama import TENSOR_PLAN, require_equal_logits, trained
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.foreign, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [({"replicate": 2}, 4), ({"tp": 2, "tp_plan": TENSOR_PLAN}, 2), ({"tp": 4, "tp_plan": TENSOR_PLAN}, 1)],
    ids=["HSDP", "FSDP and TP", "TP"],
)
def test_an_exported_model_of_four_ranks_has_equal_logits_to_the_bit(
    four: Ranks, tmp_path: Path, options: dict[str, Any], parts: int
) -> None:
    """The folder contains the whole weights, in whichever dimensions of the mesh they were sharded."""
    four.run_within(300, trained, {"type": "FSDPStrategy", **options}, str(tmp_path), parts=parts)
    require_equal_logits(tmp_path)
