"""Goodput, operations, profiles and exports of runs with ColossalAI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.colossalai.boosted_runs import PLUGINS
from tests.support import exported_llama
from tests.support.exported_runs import require_exports, require_measurements, trained
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 2"])
def test_a_run_is_measured_and_exported(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """The operations equal those counted by hand, profiles have all parts, and exports have the logits of the run."""
    seen = two.run_within(240, trained, {"type": "ColossalAIStrategy", **PLUGINS[plugin]}, str(tmp_path), measured=True)
    require_measurements(seen)
    require_exports(seen, tmp_path)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 2"])
def test_a_transformers_model_is_exported_with_equal_logits(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """``from_pretrained`` opens the export of a checkpoint of the engine, and its logits are equal to the bit."""
    pytest.importorskip("transformers", reason="requires transformers, which `make proof-plan` installs here")
    strategy = {"type": "ColossalAIStrategy", **PLUGINS[plugin]}
    two.run_within(300, exported_llama.trained, strategy, str(tmp_path), parts=2)
    exported_llama.require_equal_logits(tmp_path)
