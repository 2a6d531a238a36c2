"""Run some of the hangs from ``make hangs``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "support" / "hang_sweep.py"


def test_the_report_of_a_hang_names_the_collective_the_ranks_and_the_lines() -> None:
    """A rank that stops, one that skips a collective, and one whose process Gloo aborts are reported."""
    cases = ["gradients_under_ddp", "a_skipped_collective", "a_tensor_that_gloo_aborts"]
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *cases], check=False, capture_output=True, text=True, env=scripts_environment()
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("3 of 3 hangs were reported")
