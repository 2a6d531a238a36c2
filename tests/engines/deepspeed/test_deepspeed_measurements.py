"""Goodput, operations, profiles and exports of runs with DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.deepspeed.engine_runs import placed
from tests.support import exported_llama
from tests.support.exported_runs import require_exports, require_measurements, trained
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed


@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3"])
def test_a_run_is_measured_and_exported(two: Ranks, folder: Path, name: str) -> None:
    """The operations equal those counted by hand, profiles have all parts, and exports have the logits of the run."""
    seen = two.run_within(240, trained, placed(name), str(folder), measured=True)
    require_measurements(seen)
    require_exports(seen, folder)


@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3"])
def test_a_transformers_model_is_exported_with_equal_logits(two: Ranks, folder: Path, name: str) -> None:
    """``from_pretrained`` opens the export of a checkpoint of the engine, and its logits are equal to the bit."""
    pytest.importorskip("transformers", reason="requires transformers, which `make proof-plan` installs here")
    two.run_within(300, exported_llama.trained, placed(name), str(folder), parts=2)
    exported_llama.require_equal_logits(folder)
