"""What every group of commands shares."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stratagem.utils import import_object

__all__ = ["Traceback", "command"]

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def command(place: str) -> Any:
    """Return what serves a command, imported now: `--help` and `config show` need not wait for torch."""
    return import_object(f"stratagem.cli.{place}")
