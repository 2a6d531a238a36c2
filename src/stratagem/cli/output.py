"""Print text, tables and JSON. Names from files cannot act on the terminal.

Tables are fitted to a terminal, and have their full width elsewhere.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from typing import Annotated, Any

import rich.table
import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from stratagem.logging.console import shared_console
from stratagem.utils.printable import escape_controls, printable_name

__all__ = ["AsJson", "Table", "echo", "print_json", "print_table", "rows_of", "status"]

_UNLIMITED = 100_000

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with one object per row of a table.")]


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text to stdout, or to stderr with ``err``, with control characters escaped."""
    typer.echo(escape_controls(text), err=err, nl=nl)


def status(text: str) -> AbstractContextManager[object]:
    """Show a line with a spinner on a terminal while a block runs. Markup and control characters in it have no effect."""
    # Rich would interpret markup in a str, even on a console without markup.
    return shared_console().status(Text(printable_name(text)))


class Table(rich.table.Table):
    """A table whose text cells are single lines with control characters escaped."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable_name(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def print_table(table: rich.table.Table, *, as_json: bool = False) -> None:
    """Print a table. In a pipe or a file, no cell is wrapped, so that each row is one line and words stay whole.

    If the terminal is too narrow even with wrapped cells, the lines are longer than its width, so that no cell is cut.

    Args:
        table: the table, whose cells are strings or ``Text``.
        as_json: print a JSON list of objects with the headings as keys.
    """
    if as_json:
        print_json(rows_of(table))
        return
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        console.size = ConsoleDimensions(max(console.width, _least_width(table)), console.height)
        console.print(table)
        return
    console = Console(markup=False, highlight=False, width=_UNLIMITED)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _least_width(table: rich.table.Table) -> int:
    """Return the width at which no cell of a column that is not wrapped is cut; 0 if all columns are wrapped."""
    if not any(column.no_wrap for column in table.columns):
        return 0
    _, right, _, left = table.padding
    return sum(
        left
        + right
        + (
            max(cell_len(_plain(each)) for each in (column.header, *column.cells))
            if column.no_wrap
            else column.min_width or 1
        )
        for column in table.columns
    )


def rows_of(table: rich.table.Table) -> list[dict[str, str]]:
    """Return the rows of a table as mappings from headings to cells."""
    headings = [_plain(column.header) or "verdict" for column in table.columns]
    rows = zip(*(map(_plain, column.cells) for column in table.columns), strict=True)
    return [dict(zip(headings, row, strict=True)) for row in rows]


def print_json(value: object) -> None:
    """Print a value as JSON. NaN and Inf, which JSON does not have, are null."""
    typer.echo(json.dumps(_without_nonfinite(value), indent=1))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
