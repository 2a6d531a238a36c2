"""``make test-gpu`` uses a given interpreter as it is, and succeeds without a GPU and without optional packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="requires make")


def run_make(*arguments: str, **environment: str) -> str:
    """Run ``make`` in the repository; return its output."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHON", "MAKEFLAGS", "MAKELEVEL"}}
    return subprocess.run(
        [str(MAKE), *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=True,
    ).stdout


@pytest.mark.parametrize("target", ["test-gpu"])
def test_an_interpreter_on_the_command_line_is_used_without_installing_anything(target: str) -> None:
    """With PYTHON on the command line, no command refers to pip or .venv, and the sources come before other packages."""
    commands = run_make("--dry-run", "--always-make", target, "PYTHON=/opt/python", "PYTHONPATH=src")
    assert "/opt/python -" in commands or "/opt/python benchmarks" in commands
    assert f'PYTHONPATH="{ROOT}/src:{ROOT}' in commands
    assert "venv" not in commands
    assert "pip" not in commands


@pytest.mark.parametrize("target", ["test-gpu"])
def test_an_interpreter_in_the_environment_only_creates_the_virtual_environment(target: str) -> None:
    """PYTHON as an environment variable selects, as for other targets, the interpreter that .venv is created with."""
    commands = run_make("--dry-run", "--always-make", target, PYTHON="/opt/python")
    assert "/opt/python -m venv .venv" in commands
    assert ".venv/bin/python -m pytest" in commands or ".venv/bin/python benchmarks" in commands


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_and_pytest_timeout_every_test_prints_its_reason() -> None:
    """All tests are skipped, each with a line that names it and what it requires, and the command succeeds."""
    output = run_make(
        "test-gpu",
        f"PYTHON={sys.executable}",
        "PYTHONPATH=src",
        PYTEST_ADDOPTS="-p no:timeout -p no:xdist -p no:cacheprovider",
    )
    skipped = re.search(r"(\d+) skipped in ", output)
    assert skipped is not None, output
    reasons = re.findall(r"^SKIPPED tests/gpu/.+ - .*requires .+$", output, flags=re.MULTILINE)
    assert len(reasons) == int(skipped[1]) >= 60
