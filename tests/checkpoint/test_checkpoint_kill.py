"""A save that is killed at any moment never loses an earlier checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_a_kill_while_saving_leaves_complete_checkpoints(tmp_path: Path, suffix: str) -> None:
    """After a killed save, the latest checkpoint is complete: the previous one or the new one."""
    script = Path(__file__).with_name("save_sweep.py")
    command = [sys.executable, str(script), str(tmp_path), f"iter_1{suffix}"]
    left = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=scripts_environment()).stdout
    )
    found = [child["iter"] for child in left]
    assert set(found) == {1, 2, 3}
    assert found == sorted(found)  # the old one, then its replacement, then the next one
    assert all(child["same"] for child in left)
    first, second = f"iter_1{suffix}", f"iter_3{suffix}"
    assert all(child["names"] == ([first, second] if child["iter"] == 3 else [first]) for child in left)
    assert [child["killed"] for child in left] == [True] * (len(left) - 1) + [False]
    assert len(left) > 30
