"""Run an example as a user does, and return what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.ranks import scripts_environment

__all__ = ["run_example"]


def run_example(file: Path, folder: Path, *, seconds: float = 240) -> str:
    """Run a file in an empty folder, and return its standard output.

    Raises:
        AssertionError: if the program fails.
    """
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=folder,
        env=scripts_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
