"""Run some faults of every kind from ``make faults``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "support" / "fault_sweep.py"


@pytest.mark.parametrize(
    ("sweep", "every", "least"),
    [("kills", 23, 30), ("errors", 7, 100), ("power", 7, 150), ("damage", 5, 150), ("runs", 61, 10), ("ranks", 61, 5)],
)
def test_no_fault_loses_a_published_checkpoint(sweep: str, every: int, least: int) -> None:
    """After any fault, the next start finds a complete checkpoint and resumes automatically."""
    command = [sys.executable, str(SCRIPT), sweep, "--every", str(every)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=scripts_environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    count = re.search(r"(\d+) faults injected, 0 lost, 0 human interventions", ended.stdout)
    assert count is not None
    assert int(count[1]) >= least


def test_a_lost_checkpoint_is_reported(tmp_path: Path) -> None:
    """The sweep detects lost checkpoints: without syncing, a power loss leaves unusable data."""
    script = tmp_path / "unsynced.py"
    script.write_text(
        "import runpy, sys\n"
        "from stratagem.storage import atomic, operations\n"
        "operations.fsync = lambda descriptor: None\n"
        "from tests.support import power_loss\n"
        "power_loss.Recording._fsync = lambda *arguments: None\n"
        f"sys.argv = ['', 'power', '--every', '31']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, env=scripts_environment()
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "LOST: a directory that replaces another, power lost" in ended.stdout.replace("\n", " ")
