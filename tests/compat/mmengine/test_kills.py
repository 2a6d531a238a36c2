"""A training of the MMEngine layer that is killed at any moment resumes exactly from a complete checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment

# Of the moments before, during and after each of about 1,260 file operations, every 331st is tried.
_STEP = 331


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_resumes_exactly(tmp_path: Path) -> None:
    """The checkpoints are complete, the pointer names one of them, and the resumed run ends like one without interruption."""
    script = Path(__file__).with_name("kill_sweep.py")
    command = [sys.executable, str(script), str(tmp_path), str(_STEP)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=scripts_environment())
    whole, *children = json.loads(done.stdout)
    assert len(whole["whole"]["validations"]) == 3
    assert len(children) == -(-3 * whole["operations"] // _STEP)
    for child in children:
        assert child["killed"], child
        assert child["pointer"] is None or child["pointer"] in child["iterations"], child
        assert child["final"] == whole["whole"], child
        assert child["kept"] == ["best_x_mean_epoch_3.pth", "epoch_3.pth"], child
    assert len({tuple(child["iterations"]) for child in children}) > 3
