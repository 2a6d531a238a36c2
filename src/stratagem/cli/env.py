"""Implement ``stratagem env``."""

from __future__ import annotations

from stratagem.cli.output import echo, print_json
from stratagem.utils import collect_env

__all__ = ["print_environment"]


def print_environment(*, as_json: bool = False) -> None:
    """Print the environment report, one property per line, or as a JSON object."""
    report = collect_env()
    if as_json:
        print_json(dict(report))
        return
    width = max(map(len, report))
    for name, value in report.items():
        echo(f"{name:<{width}}  {value}")
