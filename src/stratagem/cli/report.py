"""Implement ``stratagem report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stratagem.cli.output import echo
from stratagem.report.collect import collect
from stratagem.report.page import write_report

__all__ = ["report"]


def report(runs: Sequence[Path], *, out: Path) -> None:
    """Write the report of one run, or a comparison of several runs, and print its path.

    Raises:
        CheckpointNotFoundError: if a folder does not contain a run.
        ConfigFileError: if the file cannot be written.
    """
    write_report([collect(run) for run in runs], out)
    echo(f"Saved the report to {out}")
