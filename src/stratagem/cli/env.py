"""Implement ``stratagem env``."""

from __future__ import annotations

from stratagem.cli.output import echo
from stratagem.utils import collect_env

__all__ = ["print_environment"]


def print_environment() -> None:
    """Print the environment report, one property per line."""
    report = collect_env()
    width = max(map(len, report))
    for name, value in report.items():
        echo(f"{name:<{width}}  {value}")
