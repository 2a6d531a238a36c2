"""Print tables: fitted to a terminal, in full width elsewhere, or as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["AsJson", "print_table"]

_UNLIMITED = 100_000

AsJson = Annotated[bool, typer.Option("--json", help="Print the table as a JSON list with one object per row.")]


def print_table(table: Table, *, as_json: bool = False) -> None:
    """Print a table. In a pipe or a file, no cell is wrapped, so that each row is one line and words stay whole.

    Args:
        table: the table, whose cells are strings or ``Text``.
        as_json: print a JSON list of objects with the headings as keys.
    """
    if as_json:
        headings = [_plain(column.header) or "verdict" for column in table.columns]
        rows = zip(*(map(_plain, column.cells) for column in table.columns), strict=True)
        typer.echo(json.dumps([dict(zip(headings, row, strict=True)) for row in rows], indent=1))
        return
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console = Console(markup=False, highlight=False, width=_UNLIMITED)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
