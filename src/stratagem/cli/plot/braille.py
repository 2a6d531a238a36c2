"""Draw a chart in the terminal with braille characters, which have 2 x 4 dots each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from stratagem.cli.plot.charts import Chart, Line, Panel
from stratagem.utils.printable import escape_controls, printable_name

__all__ = ["print_chart"]

_COLORS = ("blue", "red", "green", "magenta", "yellow", "cyan")
_FAINT = "bright_black"
# The number of rows; odd, so that one of them is in the middle.
_HEIGHT = 11
# The width of the y-axis labels.
_AXIS = 10
_MAX_WIDTH = 110
_BLANK = 0x2800
# The bit of each dot in a braille character, by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARK = "┊"
# The row of a column without a value.
_NOTHING = -1


def print_chart(chart: Chart, console: Console) -> None:
    """Print the title, the panels with their legends, the x axis and the notes. Uses up to 110 columns of the console."""
    width = max(20, min(console.width, _MAX_WIDTH) - _AXIS - 3)
    lines = [Text(printable_name(chart.title), style="bold")]
    if chart.subtitle:
        lines.append(Text(printable_name(chart.subtitle), style=_FAINT))
    low, high = chart.x_range
    for panel in chart.panels:
        lines.append(Text())
        lines += _panel(panel, width, low, high, log_x=chart.log_x)
    lines += _x_axis(chart, width, low, high)
    lines += [Text(escape_controls(note)) for note in chart.notes]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _panel(panel: Panel, width: int, low: float, high: float, *, log_x: bool) -> Iterator[Text]:
    columns = _spaced(low, high, 2 * width, log=log_x)
    curves = [_at_columns(line, columns) for line in panel.lines]
    # Ignore faint lines when choosing the axis range, because outliers of a diverging sweep would flatten all other
    # lines.
    strong = [curve for curve, line in zip(curves, panel.lines, strict=True) if not line.faint]
    bottom, top = _y_range(np.concatenate(strong), log=panel.log)
    bits = np.zeros((_HEIGHT, width), dtype=np.int64)
    styles = np.full((_HEIGHT, width), "", dtype=object)
    names = _legend(panel)
    # Draw faint lines first and the first line last, so that it is on top.
    order = sorted(range(len(curves)), key=lambda number: (not panel.lines[number].faint, -number))
    for number in order:
        _plot(bits, styles, _rows(curves[number], bottom, top, log=panel.log), names[number][1])
    yield _join(
        [
            Text(printable_name(panel.label), style="bold"),
            *(_entry(label, style) for label, style in names if label),
        ]
    )
    marks = {
        int(_position(mark.x, low, high, log=log_x) * (width - 1)): number for number, mark in enumerate(panel.marks)
    }
    labels = {row: _value_at(row, bottom, top, log=panel.log) for row in (0, _HEIGHT // 2, _HEIGHT - 1)}
    for row in range(_HEIGHT):
        text = Text(f"{labels.get(row, ''):>{_AXIS}} ┤" if row in labels else " " * _AXIS + " │", style=_FAINT)
        for column in range(width):
            if bits[row, column]:
                text.append(chr(_BLANK + bits[row, column]), style=styles[row, column])
            elif column in marks:
                text.append(_MARK, style=names[len(panel.lines) + marks[column]][1])
            else:
                text.append(" ")
        text.rstrip()
        yield text


def _legend(panel: Panel) -> list[tuple[str, str]]:
    """Return the labels and colors of the lines, then of the marks."""
    strong = iter(_COLORS * (len(panel.lines) + len(panel.marks)))
    return [
        *((line.label, _FAINT if line.faint else next(strong)) for line in panel.lines),
        *((mark.label, next(strong)) for mark in panel.marks),
    ]


def _plot(bits: NDArray[np.int64], styles: NDArray[np.object_], rows: NDArray[np.int64], style: str) -> None:
    """Set the dots of a curve, connecting each point to the previous one."""
    before = None
    for column, row in enumerate(rows):
        if row == _NOTHING:
            continue
        before = row if before is None else before
        for each in range(min(before, row), max(before, row) + 1):
            bits[each // 4, column // 2] |= _DOTS[each % 4][column % 2]
            styles[each // 4, column // 2] = style
        before = row


def _at_columns(line: Line, columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values of a line at the columns; NaN before and after the line, which may be shorter than the axis."""
    values = np.interp(columns, line.x, line.y)
    first, last = (int(np.abs(columns - end).argmin()) for end in (line.x[0], line.x[-1]))
    values[:first] = values[last + 1 :] = np.nan
    return values


def _rows(curve: NDArray[np.float64], bottom: float, top: float, *, log: bool) -> NDArray[np.int64]:
    position = _position(curve, bottom, top, log=log)
    rows = np.rint((1.0 - np.clip(position, 0.0, 1.0)) * (4 * _HEIGHT - 1))
    return np.where(np.isnan(rows), _NOTHING, rows).astype(np.int64)


def _y_range(values: NDArray[np.float64], *, log: bool) -> tuple[float, float]:
    bottom, top = float(np.nanmin(values)), float(np.nanmax(values))
    if not log and 0.0 < bottom < 0.1 * top:
        bottom = 0.0
    if bottom < top:
        return bottom, top
    if bottom == 0.0:
        return 0.0, 1.0
    # Center a constant line.
    return (bottom / 2, top * 2) if log else (bottom - abs(bottom) / 2, top + abs(top) / 2)


def _position(value: NDArray[np.float64] | float, low: float, high: float, *, log: bool) -> NDArray[np.float64]:
    """Return the position of a value on an axis from ``low`` (0) to ``high`` (1)."""
    if log:
        return np.asarray(np.log(np.maximum(value, low) / low) / np.log(high / low))
    return np.asarray((np.asarray(value) - low) / (high - low))


def _spaced(low: float, high: float, count: int, *, log: bool) -> NDArray[np.float64]:
    return np.geomspace(low, high, count) if log else np.linspace(low, high, count)


def _value_at(row: int, bottom: float, top: float, *, log: bool) -> str:
    fraction = 1.0 - row / (_HEIGHT - 1)
    value = bottom * (top / bottom) ** fraction if log else bottom + (top - bottom) * fraction
    return f"{value:.3g}"


def _x_axis(chart: Chart, width: int, low: float, high: float) -> Iterator[Text]:
    yield Text(" " * _AXIS + " └" + "─" * width, style=_FAINT)
    positions = [0.0, 0.25, 0.5, 0.75, 1.0] if width >= 60 else [0.0, 0.5, 1.0]
    values = [low * (high / low) ** each if chart.log_x else low + (high - low) * each for each in positions]
    if not chart.log_x and low < high <= low + len(positions) and low == int(low):
        # Several ticks would have the same label.
        values = [float(each) for each in range(int(low), int(high) + 1)]
        positions = [(each - low) / (high - low) for each in values]
    short = chart.x_label if len(chart.x_label) <= _AXIS else ""
    yield _ticks(positions, [f"{each:.3g}" if chart.log_x else f"{each:,.0f}" for each in values], width, short)
    if not short:
        yield Text(" " * (_AXIS + 2) + chart.x_label, style=_FAINT)
    if chart.epoch_length is not None:
        length = chart.epoch_length
        yield _ticks(positions, [f"{each / length:.3g}" for each in values], width, "epoch")


def _ticks(positions: list[float], labels: list[str], width: int, name: str) -> Text:
    """Return a row of tick labels at their positions (0 to 1), after the name of the unit."""
    cells = [*f"{name:>{_AXIS}}  ", *" " * width]
    for position, label in zip(positions, labels, strict=True):
        start = _AXIS + 2 + round(position * (width - 1)) - round(position * (len(label) - 1))
        cells[start : start + len(label)] = label
    return Text("".join(cells).rstrip(), style=_FAINT)


def _join(parts: list[Text]) -> Text:
    return Text("  ").join(parts)


def _entry(label: str, style: str) -> Text:
    return Text(f"● {printable_name(label)}", style=style)
