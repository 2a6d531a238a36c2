"""Write a report as one HTML file without scripts and without references to the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

from stratagem._version import __version__
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
from stratagem.cli.plot.bars import Bar, BarChart, BarGroup, end_of_axis, visible_limit
from stratagem.cli.plot.png import PALETTE
from stratagem.errors import ConfigFileError
from stratagem.planning.report import Report, Section
from stratagem.storage import write_atomic

__all__ = ["html_of", "write_html"]

_STYLE: Final = """
:root {
  color-scheme: light dark;
  --text: #1f2937; --faint: #6b7280; --line: #e5e7eb; --page: #ffffff; --track: #f3f4f6; --yes: #047857; --no: #b91c1c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e5e7eb; --faint: #9ca3af; --line: #374151; --page: #111827; --track: #1f2937; --yes: #34d399; --no: #f87171;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--text); background: var(--page); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
.faint, footer { color: var(--faint); font-size: 0.875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child {
  text-align: left; white-space: normal; min-width: 9rem; position: sticky; left: 0; background: var(--page);
}
.yes { color: var(--yes); }
.no { color: var(--no); }
.row {
  display: grid; grid-template-columns: minmax(8rem, 17rem) 1fr 5.5rem; gap: 0.6rem; align-items: center; margin: 0.3rem 0;
  font-size: 0.875rem;
}
.track { position: relative; display: flex; height: 1.4rem; background: var(--track); overflow: hidden; }
.track i { display: block; height: 100%; flex: none; }
.limit { position: absolute; top: 0; bottom: 0; width: 3px; background: var(--text); outline: 1px solid var(--page); }
.bars { margin-top: 1rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.875rem; margin-top: 0.5rem; }
.legend i { display: inline-block; width: 0.8rem; height: 0.8rem; margin-right: 0.35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0.5rem 0; font-size: 0.875rem; }
dt { color: var(--faint); }
dd { margin: 0; }
ol, ul { padding-left: 1.4rem; margin: 0.5rem 0; }
@media (max-width: 40rem) {
  .row { grid-template-columns: 1fr 5.5rem; gap: 0.1rem 0.6rem; margin: 0.8rem 0; }
  .row > :first-child { grid-column: 1 / -1; }
  th:first-child, td:first-child { min-width: 8rem; overflow-wrap: anywhere; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 0.4rem; }
}
"""


def write_html(report: Report, path: Path) -> None:
    """Write the report to ``path`` atomically.

    Raises:
        ConfigFileError: if the file cannot be written.
    """
    try:
        write_atomic(path, html_of(report).encode())
    except OSError as error:
        raise ConfigFileError(
            f"{path} cannot be written: {error.strerror or error}. Choose a different path with --html."
        ) from error


def html_of(report: Report) -> str:
    """Return the report as HTML."""
    unit = unit_of(report)
    chart = bar_chart(report)
    groups = {group.title: group for group in chart.groups}
    sections = "".join(_section(section, groups.get(heading(section)), chart, unit) for section in report.sections)
    assumed = _list("Assumptions", report.assumptions)
    sources = _list("Sources", report.sources)
    title = escape(f"{report.title}: plan")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{escape(model_line(report))}</p>\n{sections}"
        f"<footer>\n{assumed}{sources}<p>stratagem {escape(__version__)}</p>\n</footer>\n</body>\n</html>\n"
    )


def _section(section: Section, group: BarGroup | None, chart: BarChart, unit: Unit) -> str:
    choices = "".join(
        f"<li><b>{escape(each.estimate.step.label)}</b>: {escape(each.why)}</li>\n" for each in section.choices
    )
    best = f"<ol>\n{choices}</ol>" if choices else "<p>No strategy can train this model at this number of ranks.</p>"
    memory = [memory_cells(each, unit) for each in section.estimates]
    speed = [speed_cells(each, unit) for each in section.estimates]
    return "\n".join(
        (
            f"<section>\n<h2>{escape(heading(section))}</h2>",
            best,
            "" if group is None else _bars(group, chart),
            f"<h3>Memory of a rank in {unit.name}</h3>",
            _table(MEMORY_HEADINGS, memory),
            f'<p class="faint">{escape(table_note(unit))}</p>',
            "<h3>Speed</h3>",
            _table(SPEED_HEADINGS, speed),
            *_advice(section),
            *_details(section),
            _list("Notes", problem_lines(section)),
            "</section>\n",
        )
    )


def _bars(group: BarGroup, chart: BarChart) -> str:
    end = end_of_axis(group)
    rows = "".join(_bar(bar, chart, group, end) for bar in group.bars)
    legend = "".join(
        f'<span><i style="background:{PALETTE[number]}"></i>{escape(name)}</span>'
        for number, name in enumerate(chart.segments)
    )
    where = "The line is at" if visible_limit(group) is not None else "Far to the right:"
    limit = "" if group.limit is None else f'<p class="faint">{where} {escape(group.limit_label)}.</p>'
    return f'<div class="bars">\n{rows}</div>\n<div class="legend">{legend}</div>\n{limit}'


def _bar(bar: Bar, chart: BarChart, group: BarGroup, end: float) -> str:
    parts = "".join(
        f'<i style="width:{100 * size / end:.3f}%;background:{PALETTE[number]}" '
        f'title="{escape(name)}: {size:.3g} {chart.unit}"></i>'
        for number, name in enumerate(chart.segments)
        if (size := bar.sizes.get(name, 0.0)) > 0
    )
    value = visible_limit(group)
    limit = "" if value is None else f'<span class="limit" style="left:{100 * value / end:.3f}%"></span>'
    too_large = value is not None and bar.total > value
    style = ' class="no"' if too_large else ""
    return (
        f'<div class="row"><span>{escape(bar.label)}</span><span class="track">{parts}{limit}</span>'
        f"<span{style}>{'» ' if bar.total > 1.001 * end else ''}{escape(bar.text)}</span></div>\n"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = "".join(
        f"<tr>{''.join(_cell(name, cell) for name, cell in zip(headings, row, strict=True))}</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _cell(name: str, text: str) -> str:
    style = f' class="{text}"' if name == "fits" and text in {"yes", "no"} else ""
    # Long names of options break at these characters on narrow screens.
    shown = escape(text)
    for character in "_=":
        shown = shown.replace(character, f"{character}<wbr>") if name == "strategy" else shown
    return f"<td{style}>{shown}</td>"


def _advice(section: Section) -> Iterator[str]:
    if section.advice is None:
        return
    first, *others = advice_lines(section.advice)
    yield f"<h3>What to try</h3>\n<p>{escape(first)}</p>"
    if others:
        yield f"<ul>\n{''.join(f'<li>{escape(line)}</li>{chr(10)}' for line in others)}</ul>"


def _details(section: Section) -> Iterator[str]:
    if not section.choices:
        return
    best = section.choices[0].estimate
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in detail_rows(best))
    yield f"<h3>{escape(best.step.label)} in detail</h3>\n<dl>\n{rows}</dl>"
    if best.collectives:
        yield _table(COLLECTIVE_HEADINGS, collective_rows(best))


def _list(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<h3>{escape(title)}</h3>\n<ul>\n{items}</ul>\n" if items else ""
