"""Print tables: fitted to a terminal, in full width elsewhere, or as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["AsJson", "print_json", "print_table", "rows_of"]

_UNLIMITED = 100_000

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with one object per row of a table.")]


def print_table(table: Table, *, as_json: bool = False) -> None:
    """Print a table. In a pipe or a file, no cell is wrapped, so that each row is one line and words stay whole.

    Args:
        table: the table, whose cells are strings or ``Text``.
        as_json: print a JSON list of objects with the headings as keys.
    """
    if as_json:
        print_json(rows_of(table))
        return
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console = Console(markup=False, highlight=False, width=_UNLIMITED)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def rows_of(table: Table) -> list[dict[str, str]]:
    """Return the rows of a table as mappings from headings to cells."""
    headings = [_plain(column.header) or "verdict" for column in table.columns]
    rows = zip(*(map(_plain, column.cells) for column in table.columns), strict=True)
    return [dict(zip(headings, row, strict=True)) for row in rows]


def print_json(value: object) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1))


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
