"""Run ``stratagem parity`` for a strategy in separate processes and parse its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import stratagem as package

CONFIG = Path(__file__).parents[1] / "cli" / "toy_config.py"


def verdicts(strategy: str, *further: str) -> dict[str, str]:
    """Compare three steps of the toy configuration under a strategy on two ranks; return the verdict of each run."""
    words = ["parity", str(CONFIG), "--strategy", strategy, "--steps", "3", "--eval-layers", *further]
    words += ["--set", "train_dataloader.batch_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "stratagem", *words],
        capture_output=True, text=True, check=False, timeout=240,
        # Wide enough that names are not wrapped.
        env={**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:3]] for line in done.stdout.splitlines() if line.startswith("│")
    ]
    return dict(rows)
