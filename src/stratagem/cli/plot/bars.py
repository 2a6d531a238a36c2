"""Horizontal stacked bars with a line at a limit: their contents, in the terminal and as a PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.text import Text

from stratagem.cli.plot.png import PALETTE, save_png, styled_figures
from stratagem.errors import ConfigValueError
from stratagem.utils.printable import printable_name

__all__ = ["Bar", "BarChart", "BarGroup", "end_of_axis", "print_bars", "visible_limit", "write_bars_png"]

# Terminal colors in the order of the segments; the last segment is faint.
_COLORS = ("blue", "yellow", "green", "red", "cyan", "magenta", "white", "bright_black")
_LETTERS = "PGOACTXD"
_LIMIT = "┃"
_MAX_WIDTH = 110
_SUBTITLE_WIDTH = 115
_LABEL_WIDTH = 32
# A limit that is larger than all bars by this factor is not drawn.
_FAR = 8


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar: the sizes of its segments by name, and a short text behind it."""

    label: str
    sizes: Mapping[str, float]
    text: str = ""

    @property
    def total(self) -> float:
        """The length of the bar."""
        return sum(self.sizes.values())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BarGroup:
    """Bars with a common heading and limit."""

    title: str
    bars: tuple[Bar, ...]
    limit: float | None
    limit_label: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Groups of bars with the same unit and segments.

    Attributes:
        title: the title.
        unit: the unit of the sizes.
        segments: the names of all segments in the order in which they are stacked; at most eight.
        groups: the groups from top to bottom.
        subtitle: a line below the title.
    """

    title: str
    unit: str
    segments: tuple[str, ...]
    groups: tuple[BarGroup, ...]
    subtitle: str = ""


def visible_limit(group: BarGroup) -> float | None:
    """Return the limit of a group; None if there is none, or if it is so large that the bars would be too short to be read."""
    if group.limit is None or group.limit > _FAR * max(bar.total for bar in group.bars):
        return None
    return group.limit


def end_of_axis(group: BarGroup) -> float:
    """Return the largest size that is drawn: the longest bar, but at most twice the limit so that other bars are visible."""
    longest, limit = max(bar.total for bar in group.bars), visible_limit(group)
    return longest if limit is None else max(1.02 * limit, min(longest, 2 * limit))


def print_bars(chart: BarChart, console: Console) -> None:
    """Print the chart. Segments are colored, and consist of letters if the console has no color."""
    for line in _lines(
        chart, min(console.width, _MAX_WIDTH), colored=console.color_system is not None and not console.no_color
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(chart: BarChart, width: int, *, colored: bool) -> Iterator[Text]:
    if not chart.groups:
        return
    label_width = min(width // 2, max(len(bar.label) for group in chart.groups for bar in group.bars))
    text_width = max(len(bar.text) for group in chart.groups for bar in group.bars)
    cells = max(20, width - label_width - text_width - 3)
    for group in chart.groups:
        end = end_of_axis(group)
        value = visible_limit(group)
        limit = None if value is None else round(cells * value / end)
        yield Text(printable_name(group.title), style="bold")
        for bar in group.bars:
            first, *others = textwrap.wrap(printable_name(bar.label), label_width, break_on_hyphens=False) or [""]
            line = Text(f"{first:<{label_width}} ")
            line.append_text(_bar(chart, bar, cells, end, limit, colored=colored))
            line.append(f" {bar.text}")
            yield line
            yield from map(Text, others)
        if limit is not None:
            yield _limit_line(group, label_width + 1, min(limit, cells - 1), cells + text_width)
        elif group.limit is not None:
            yield Text(f"{group.limit_label} is far to the right.", style="bright_black")
    yield from _legend(chart, width, colored=colored)


def _legend(chart: BarChart, width: int, *, colored: bool) -> Iterator[Text]:
    """Yield the names of the segments, in as many lines as the width requires."""
    line = Text()
    for number, name in enumerate(chart.segments):
        if line and line.cell_len + len(name) + 2 > width:
            line.rstrip()
            yield line
            line = Text()
        line.append("█" if colored else _LETTERS[number], style=_COLORS[number] if colored else "")
        line.append(f" {name}   ")
    line.rstrip()
    yield line


def _limit_line(group: BarGroup, start: int, column: int, room: int) -> Text:
    """Return the label of the limit at its mark, or left of it near the right edge."""
    mark = f"{_LIMIT} {group.limit_label}"
    if column + len(mark) <= room:
        return Text(" " * (start + column) + mark, style="bright_black")
    return Text(f"{group.limit_label} {_LIMIT}".rjust(start + column + 1), style="bright_black")


def _bar(chart: BarChart, bar: Bar, cells: int, end: float, limit: int | None, *, colored: bool) -> Text:
    signs: list[tuple[str, str]] = []
    position = 0.0
    for number, name in enumerate(chart.segments):
        position += bar.sizes.get(name, 0.0)
        # Rounding the ends instead of the sizes keeps the sum.
        count = min(cells, round(cells * position / end)) - len(signs)
        signs += [("█" if colored else _LETTERS[number], _COLORS[number] if colored else "")] * count
    if bar.total > end * 1.001 and signs:
        signs[-1] = ("»", "bold")
    signs += [(" ", "")] * (cells - len(signs))
    if limit is not None:
        at = min(limit, cells - 1)
        signs[at] = (_LIMIT, "bold")
    line = Text()
    for sign, style in signs:
        line.append(sign, style=style)
    return line


def write_bars_png(chart: BarChart, path: Path) -> None:
    """Draw the chart and write it to ``path`` atomically.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        ConfigFileError: if the file cannot be written.
        ConfigValueError: if the chart has no bars.
    """
    if not chart.groups:
        raise ConfigValueError(f"{path} was not written: there are no bars to draw.")
    with styled_figures() as figures:
        counts = [len(group.bars) for group in chart.groups]
        figure = figures.Figure(
            figsize=(9.5, 1.6 + sum(0.9 + 0.34 * count for count in counts)), dpi=150, layout="constrained"
        )
        axes = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[count + 1 for count in counts])[:, 0]
        handles: dict[str, Any] = {}
        for group, axis in zip(chart.groups, axes, strict=True):
            _draw_group(axis, chart, group, handles)
        axes[-1].set_xlabel(f"{chart.unit} per rank")
        lines = [chart.title, *textwrap.wrap(chart.subtitle, _SUBTITLE_WIDTH)]
        figure.suptitle("\n".join(lines), x=0.02, ha="left", fontsize=11, color="#111827")
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
        save_png(figure, path)


def _draw_group(axis: Any, chart: BarChart, group: BarGroup, handles: dict[str, Any]) -> None:
    rows = range(len(group.bars))
    left = [0.0] * len(group.bars)
    for number, name in enumerate(chart.segments):
        sizes = [bar.sizes.get(name, 0.0) for bar in group.bars]
        handles[name] = axis.barh(rows, sizes, left=left, height=0.72, color=PALETTE[number], label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    end = end_of_axis(group)
    axis.set_xlim(0, end * 1.3)
    for row, bar in zip(rows, group.bars, strict=True):
        cut = bar.total > end * 1.001
        axis.text(min(bar.total, end) + 0.01 * end, row, f"{'» ' if cut else ''}{bar.text}", va="center", fontsize=9,
            zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
        if cut:
            axis.barh([row], [end * 0.3], left=end, height=0.8, color="white", zorder=1.5)
    limit = visible_limit(group)
    if limit is not None:
        axis.axvline(limit, color="#111827", linewidth=1.6)
        axis.annotate(
            group.limit_label, (limit, 1), xycoords=("data", "axes fraction"), xytext=(4, 2),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axis.set_yticks(list(rows), [textwrap.fill(bar.label, _LABEL_WIDTH) for bar in group.bars])
    axis.invert_yaxis()
    axis.grid(visible=True, axis="x")
    axis.set_title(group.title, loc="left", fontsize=10, pad=14)
