"""Run the examples of the documentation."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import scripts_environment

__all__ = ["run_example", "run_in_process"]


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


def run_in_process(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a file in an empty folder in this process, which does not import torch again."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(file.parent))
    imported = {each.stem for each in file.parent.glob("*.py")}
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        for name in imported & sys.modules.keys():
            del sys.modules[name]
