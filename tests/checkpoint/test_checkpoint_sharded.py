"""Models that are spread over ranks are saved by all of them, as if one process had saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ranks import scripts_environment


@pytest.mark.slow
def test_ranks_write_the_file_that_one_process_writes(tmp_path: Path) -> None:
    """On 2, 3 and 4 ranks, by rows, columns and both, uneven, replicated: the same bytes, which any number of ranks reads."""
    command = [sys.executable, str(Path(__file__).with_name("sharded_saves.py")), str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=scripts_environment(), timeout=200)
    assert (ended.stdout, ended.returncode) == ("", 0), ended.stderr
    # All eight ways on four ranks, and what one process saved.
    assert len(list((tmp_path / "4").glob("*/manifest.json"))) == 9
