"""Print a report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from stratagem.cli.output import Table, echo, print_table
from stratagem.cli.plan.facts import (
    COLLECTIVE_HEADINGS,
    MEMORY_HEADINGS,
    SPEED_HEADINGS,
    Unit,
    advice_lines,
    bar_chart,
    collective_rows,
    detail_rows,
    heading,
    memory_cells,
    model_line,
    problem_lines,
    speed_cells,
    table_note,
    unit_of,
)
from stratagem.cli.plot.bars import print_bars
from stratagem.planning.report import Report, Section
from stratagem.planning.timing import Estimate

__all__ = ["print_report"]

# The width of the longest name of a collective.
_TEXT_WIDTH = 14
_FIT_STYLES = {"yes": "green", "no": "red"}


def print_report(report: Report) -> None:
    """Print the tables, bars, choices and advice of a report."""
    unit = unit_of(report)
    echo(report.title)
    echo(model_line(report))
    for section in report.sections:
        echo("")
        echo(heading(section))
        _print_strategies(section, unit)
        echo("")
        _print_choices(section)
    echo("")
    print_bars(bar_chart(report), Console(highlight=False))
    echo("")
    for line in report.assumptions:
        echo(f"Assumed: {line}")


def _print_strategies(section: Section, unit: Unit) -> None:
    rows = [memory_cells(each, unit) for each in section.estimates]
    _print_rows(MEMORY_HEADINGS, rows)
    if any(cell != "-" for each in section.estimates for cell in speed_cells(each, unit)[1:]):
        echo("")
        _print_rows(SPEED_HEADINGS, [speed_cells(each, unit) for each in section.estimates])
    echo(table_note(unit))


def _print_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> None:
    """Print a table. If the terminal is narrow, only the first columns, with ``texts``, are wrapped: numbers stay whole."""
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(headings):
        is_text = number < texts
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
            min_width=_TEXT_WIDTH if is_text else None,
        )
    for row in rows:
        table.add_row(
            *(
                Text(cell, _FIT_STYLES.get(cell, "")) if name == "fits" else cell
                for name, cell in zip(headings, row, strict=True)
            )
        )
    print_table(table)


def _print_choices(section: Section) -> None:
    if not section.choices:
        echo("No strategy can train this model at this number of ranks.")
    for number, choice in enumerate(section.choices, 1):
        echo(f"{number}. {choice.estimate.step.label}: {choice.why}")
    if section.advice is not None:
        first, *others = advice_lines(section.advice)
        echo(first)
        for line in others:
            echo(f"  - {line}")
    if section.choices:
        _print_details(section.choices[0].estimate)
    for line in problem_lines(section):
        echo(f"Note: {line}")


def _print_details(each: Estimate) -> None:
    rows = list(detail_rows(each))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        echo(f"  {name:<{width}}  {value}")
    if not each.collectives:
        return
    _print_rows(COLLECTIVE_HEADINGS, collective_rows(each), texts=2)
