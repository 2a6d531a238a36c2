"""``make test-gpu`` and ``make bench-gpu`` use a given interpreter as it is, and succeed without a GPU."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_an_interpreter_on_the_command_line_is_used_without_installing_anything(target: str) -> None:
    """With PYTHON on the command line, no command refers to pip or .venv, and the sources come before other packages."""
    commands = run_make("--dry-run", "--always-make", target, "PYTHON=/opt/python", "PYTHONPATH=src")
    assert "/opt/python -" in commands or "/opt/python benchmarks" in commands
    assert f'PYTHONPATH="{ROOT}/src:{ROOT}' in commands
    assert "venv" not in commands
    assert "pip" not in commands


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
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


BENCHMARK = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that runs the benchmark in this process with command line options."""

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *options])
        runpy.run_path(str(BENCHMARK), run_name="__main__")

    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    # The benchmark sets it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_benchmark_prints_one_line(
    benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU, the benchmark reports it in one line and succeeds."""
    benchmark()
    expected = f"Skipped: this benchmark requires a GPU, and torch {torch.__version__} finds none.\n"
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_the_benchmark_measures_everything_with_tiny_models_on_the_cpu(
    benchmark: Callable[..., None], tmp_path: Path
) -> None:
    """The whole benchmark runs on the CPU: a row for each variant of a job, and one for its saves."""
    options = ["--device", "cpu", "--tiny", "--rounds", "2", "--block", "1", "--workers", "0"]
    chosen = ["--jobs", "GPT-124M", "--variants", "fp32", "bf16, compiled", "--output", str(tmp_path / "table.md")]
    benchmark(*options, *chosen)
    text = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "GPT-124M" in line]
    assert [row[1] for row in rows[:2]] == ["fp32", "bf16, compiled"]
    assert [len(row) for row in rows] == [9, 9, 5]
    assert f"torch {torch.__version__}" in text


def test_the_models_of_the_benchmark_have_the_sizes_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model has the parameters of ResNet-50, the other one those of GPT-2 with a vocabulary of 50,304 words."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_jobs.models import JOBS

    with torch.device("meta"):
        counts = {name: sum(each.numel() for each in job.model().parameters()) for name, job in JOBS.items()}
    assert counts == {"ResNet-50": 25_557_032, "GPT-124M": 124_439_808 + (50_304 - 50_257) * 768}
