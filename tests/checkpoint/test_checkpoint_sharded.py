"""Sharded models are saved by all ranks; the files equal those written by a single process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment


@pytest.mark.slow
def test_ranks_write_the_same_files_as_one_process(tmp_path: Path) -> None:
    """2, 3 and 4 ranks with any placement write the same bytes, which any number of ranks can read."""
    command = [sys.executable, str(Path(__file__).with_name("sharded_saves.py")), str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=scripts_environment(), timeout=200)
    assert (ended.stdout, ended.returncode) == ("", 0), ended.stderr
    # All eight placements on four ranks, and the checkpoint of one process.
    assert len(list((tmp_path / "4").glob("*/manifest.json"))) == 9
