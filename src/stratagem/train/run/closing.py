"""Describe the results of a run at its end: metrics, checkpoints, and where to look."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from stratagem.checkpoint import best_checkpoints, find_latest_checkpoint
from stratagem.train.run.context import Run

__all__ = ["closing_rows", "closing_summary", "relative_path", "trained_length"]


def trained_length(run: Run) -> str:
    """Return how long a run has trained, such as ``2 epochs (250 iterations)``."""
    iterations = _count(run.iter, "iteration")
    return f"{_count(run.epoch, 'epoch')} ({iterations})" if run.max_epochs is not None else iterations


def closing_rows(run: Run) -> dict[str, str]:
    """Return the last metrics, the last and the best checkpoints, and the folder of the logs, by name."""
    rows = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in run.metrics.items()}
    checkpoint = run.last_checkpoint or find_latest_checkpoint(run.work_dir)
    if checkpoint is not None:
        rows["checkpoint"] = relative_path(checkpoint)
    for metric, best in best_checkpoints(run.work_dir, run_id=run.id).items():
        rows[f"best {metric}"] = f"{relative_path(best.path)} ({best.retention_tag.score:.4f})"
    rows["logs"] = relative_path(Path(run.log_dir))
    return rows


def closing_summary(headline: str, rows: Mapping[str, str]) -> str:
    """Return a headline and aligned rows as text."""
    width = max(map(len, rows))
    return "\n".join([headline, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def relative_path(path: Path) -> str:
    """Return the path relative to the working directory if it is inside it, otherwise unchanged."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
