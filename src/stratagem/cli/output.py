"""Print text and tables in which names from files cannot act on the terminal."""

from __future__ import annotations

from typing import Any

import rich.table
import typer

from stratagem.utils.printable import escape_controls, printable_name

__all__ = ["Table", "echo"]


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text to stdout, or to stderr with ``err``, with control characters escaped."""
    typer.echo(escape_controls(text), err=err, nl=nl)


class Table(rich.table.Table):
    """A table whose text cells are single lines with control characters escaped."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable_name(cell) if isinstance(cell, str) else cell for cell in cells), **options)
