"""Implement ``stratagem summary``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as PlainTable
from rich.text import Text

from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import Table, echo, print_json, print_table, status
from stratagem.config import require
from stratagem.config_schema import SECTIONS
from stratagem.planning.summary import HEADINGS, ModelSummary, summarize_config

__all__ = ["summary"]

# The module, its class and its shape are aligned to the left, and numbers to the right.
_NUM_TEXTS = 3
_WIDE = 110
_OMITTED = ("type", "trainable")


def summary(options: RunOptions, *, batch: str | None, depth: int | None, as_json: bool) -> None:
    """Print the modules of the model of a configuration.

    Raises:
        ConfigError: or a subclass, if the configuration or an option is invalid.
        StateError: if the forward pass fails.
    """
    config = read_config(options)
    require(config, SECTIONS, scope=config.get("default_scope"))
    with status("Summarizing"):
        found = summarize_config(config, batch=batch, depth=depth)
    if as_json:
        print_json(found.as_dict())
        return
    print_table(_table(found))
    echo("")
    width = max(len(name) for name, _ in found.totals())
    for name, value in found.totals():
        echo(f"{name:<{width}}  {value}")
    for note in found.notes:
        echo(f"Note: {note}")


def _table(found: ModelSummary) -> PlainTable:
    """Return the table. A narrow terminal gets fewer columns, and only names and shapes are wrapped."""
    console = Console()
    is_narrow = console.is_terminal and console.width < _WIDE
    table = Table(box=None, pad_edge=False)
    shown = [index for index, heading in enumerate(HEADINGS) if not (is_narrow and heading in _OMITTED)]
    for index in shown:
        is_number = index >= _NUM_TEXTS
        table.add_column(HEADINGS[index], justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in found.rows(is_narrow=is_narrow):
        # Text keeps the indentation of nested modules.
        table.add_row(*(Text(row[index]) if index == 0 else row[index] for index in shown))
    return table
