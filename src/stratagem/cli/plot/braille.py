"""Draw a chart in the terminal, with the eight dots of braille characters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from stratagem.cli.plot.charts import Chart, Panel

__all__ = ["print_chart"]

_COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan")
_FAINT = "bright_black"
# Odd, so that there is a row in the middle.
_HEIGHT = 11
_AXIS = 10
_WIDEST = 110
_BLANK = 0x2800
# The bit of each of a character's dots: four rows of two.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARK = "┊"


def print_chart(chart: Chart, console: Console) -> None:
    """Print title, panels with their legends, axis and notes, as wide as the console."""
    width = max(20, min(console.width, _WIDEST) - _AXIS - 3)
    lines = [Text(chart.title, style="bold")]
    if chart.subtitle:
        lines.append(Text(chart.subtitle, style=_FAINT))
    low, high = chart.x_range
    for panel in chart.panels:
        lines.append(Text())
        lines += _panel(panel, width, low, high, log_x=chart.log_x)
    lines += _x_axis(chart, width, low, high)
    lines += [Text(note) for note in chart.notes]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _panel(panel: Panel, width: int, low: float, high: float, *, log_x: bool) -> Iterator[Text]:
    columns = _spaced(low, high, 2 * width, log=log_x)
    curves = [np.interp(columns, line.x, line.y) for line in panel.lines]
    # What is faint does not decide what is seen: single losses of a sweep that diverges would flatten the rest.
    seen = [curve for curve, line in zip(curves, panel.lines, strict=True) if not line.faint]
    bottom, top = _y_range(np.concatenate(seen), log=panel.log)
    bits = np.zeros((_HEIGHT, width), dtype=np.int64)
    styles = np.full((_HEIGHT, width), "", dtype=object)
    names = _legend(panel)
    # Strong lines over faint ones, and the first of equal ones on top.
    order = sorted(range(len(curves)), key=lambda number: (not panel.lines[number].faint, -number))
    for number in order:
        _plot(bits, styles, _rows(curves[number], bottom, top, log=panel.log), names[number][1])
    yield _join(
        [Text(panel.label, style="bold"), *(Text(f"● {label}", style=style) for label, style in names if label)]
    )
    marks = {int(_place(mark.x, low, high, log=log_x) * (width - 1)): number for number, mark in enumerate(panel.marks)}
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
    """Return label and colour of the lines, then of the marks."""
    strong = iter(_COLOURS * (len(panel.lines) + len(panel.marks)))
    return [
        *((line.label, _FAINT if line.faint else next(strong)) for line in panel.lines),
        *((mark.label, next(strong)) for mark in panel.marks),
    ]


def _plot(bits: NDArray[np.int64], styles: NDArray[np.object_], rows: NDArray[np.int64], style: str) -> None:
    """Set the dots of a curve, joining each to the one before it."""
    before = rows[0]
    for column, row in enumerate(rows):
        for each in range(min(before, row), max(before, row) + 1):
            bits[each // 4, column // 2] |= _DOTS[each % 4][column % 2]
            styles[each // 4, column // 2] = style
        before = row


def _rows(curve: NDArray[np.float64], bottom: float, top: float, *, log: bool) -> NDArray[np.int64]:
    place = _place(curve, bottom, top, log=log)
    return np.rint((1.0 - np.clip(place, 0.0, 1.0)) * (4 * _HEIGHT - 1)).astype(np.int64)


def _y_range(values: NDArray[np.float64], *, log: bool) -> tuple[float, float]:
    bottom, top = float(values.min()), float(values.max())
    if not log and 0.0 < bottom < 0.1 * top:
        bottom = 0.0
    if bottom < top:
        return bottom, top
    if bottom == 0.0:
        return 0.0, 1.0
    # A flat line lies in the middle.
    return (bottom / 2, top * 2) if log else (bottom - abs(bottom) / 2, top + abs(top) / 2)


def _place(value: NDArray[np.float64] | float, low: float, high: float, *, log: bool) -> NDArray[np.float64]:
    """Return where between low (0) and high (1) a value lies."""
    if log:
        return np.asarray(np.log(np.maximum(value, low) / low) / np.log(high / low))
    return np.asarray((np.asarray(value) - low) / (high - low))


def _spaced(low: float, high: float, count: int, *, log: bool) -> NDArray[np.float64]:
    return np.geomspace(low, high, count) if log else np.linspace(low, high, count)


def _value_at(row: int, bottom: float, top: float, *, log: bool) -> str:
    share = 1.0 - row / (_HEIGHT - 1)
    value = bottom * (top / bottom) ** share if log else bottom + (top - bottom) * share
    return f"{value:.3g}"


def _x_axis(chart: Chart, width: int, low: float, high: float) -> Iterator[Text]:
    yield Text(" " * _AXIS + " └" + "─" * width, style=_FAINT)
    places = [0.0, 0.25, 0.5, 0.75, 1.0] if width >= 60 else [0.0, 0.5, 1.0]
    values = [low * (high / low) ** each if chart.log_x else low + (high - low) * each for each in places]
    short = chart.x_label if len(chart.x_label) <= _AXIS else ""
    yield _ticks(places, [f"{each:.3g}" if chart.log_x else f"{each:,.0f}" for each in values], width, short)
    if not short:
        yield Text(" " * (_AXIS + 2) + chart.x_label, style=_FAINT)
    if chart.epoch_length is not None:
        length = chart.epoch_length
        yield _ticks(places, [f"{each / length:.3g}" for each in values], width, "epoch")


def _ticks(places: list[float], labels: list[str], width: int, name: str) -> Text:
    """Return the labels under their places, and left of them what they count."""
    cells = [*f"{name:>{_AXIS}}  ", *" " * width]
    for place, label in zip(places, labels, strict=True):
        start = _AXIS + 2 + round(place * (width - 1)) - round(place * (len(label) - 1))
        cells[start : start + len(label)] = label
    return Text("".join(cells).rstrip(), style=_FAINT)


def _join(parts: list[Text]) -> Text:
    return Text("  ").join(parts)
