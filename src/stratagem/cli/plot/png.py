"""Draw a chart as a PNG file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stratagem.cli.plot.charts import Chart, Panel
from stratagem.errors import ConfigFileError
from stratagem.storage import write_atomic
from stratagem.utils import import_module

__all__ = ["PALETTE", "save_png", "styled_figures", "write_png"]

# The palette of Okabe and Ito, which is safe for all types of color blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The colors of areas, in an order in which neighbors differ in brightness, also in greyscale. The last one is for what matters
# least.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#9ca3af")
_GREY = "#6b7280"
_NOTE_WIDTH = 125
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    # File and parameter names may contain "$", which must not start a formula.
    "text.parse_math": False,
}


def write_png(chart: Chart, path: Path) -> None:
    """Draw the chart and write it to ``path`` atomically.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        ConfigFileError: if the file cannot be written.
    """
    with styled_figures() as figures:
        count = len(chart.panels)
        height = 1.9 + (3.2 if count == 1 else 2.5 * count) + 0.2 * len(chart.notes)
        figure = figures.Figure(figsize=(9, height), dpi=150, layout="constrained")
        axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for number, (panel, axis) in enumerate(zip(chart.panels, axes, strict=True)):
            _draw(axis, panel, color=number)
        if chart.log_x:
            axes[-1].set_xscale("log")
            _plain_numbers(axes[-1].xaxis)
        else:
            axes[-1].xaxis.get_major_locator().set_params(integer=True)
            axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[-1].set_xlim(*_widened(*chart.x_range, log=chart.log_x))
        axes[-1].set_xlabel(chart.x_label)
        notes = [line for note in chart.notes for line in textwrap.wrap(note, _NOTE_WIDTH)]
        figure.supxlabel("\n".join(notes), x=0.02, ha="left", fontsize=9, color=_GREY)
        _title(axes[0], chart)
        save_png(figure, path)


@contextmanager
def styled_figures() -> Iterator[Any]:
    """Yield the module ``matplotlib.figure``, with the style of all charts.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    matplotlib = import_module("matplotlib", extra="plot")
    # pyplot would require a GUI backend and keep global state.
    figures = import_module("matplotlib.figure", extra="plot")
    with matplotlib.rc_context(_STYLE):
        yield figures


def save_png(figure: Any, path: Path) -> None:
    """Write a figure to ``path`` atomically.

    Raises:
        ConfigFileError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise ConfigFileError(
            f"{path} cannot be written: {error.strerror or error}. Choose a different path with --out."
        ) from error


def _widened(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """Widen a range by 1% on both sides, so that points at its ends are fully visible."""
    if log:
        factor = (high / low) ** 0.01
        return low / factor, high * factor
    margin = 0.01 * (high - low)
    return low - margin, high + margin


def _draw(axis: Any, panel: Panel, *, color: int) -> None:
    # Panels with a single line get different colors. In a panel with several lines, each line gets a different color.
    shift = color if len(panel.lines) == 1 else 0
    strong = 0
    for line in panel.lines:
        shown = _GREY if line.faint else _COLORS[(strong + shift) % len(_COLORS)]
        strong += not line.faint
        axis.plot(
            line.x, line.y, label=line.label, color=shown,
            linewidth=1.0 if line.faint else 2.0, alpha=0.45 if line.faint else 1.0, solid_joinstyle="round",
        )  # fmt: skip
    for number, mark in enumerate(panel.marks):
        axis.axvline(mark.x, label=mark.label, color=_COLORS[number + 1], linestyle=("--", ":")[number % 2])
    if panel.log:
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
    if any(line.faint for line in panel.lines):
        # Faint lines may exceed the range of the axis, because outliers would flatten all other lines.
        values = [value for line in panel.lines if not line.faint for value in line.y]
        margin = 0.4 * (max(values) - min(values)) or 1.0
        axis.set_ylim(min(values) - margin, max(values) + margin)
    axis.set_ylabel(panel.label)
    axis.grid(visible=True)
    if len(panel.lines) + len(panel.marks) > 1 or panel.lines[0].label:
        axis.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def _plain_numbers(axis: Any) -> None:
    """Label the ticks of a logarithmic axis with plain numbers, such as 0.001, instead of powers of 10."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter("")


def _title(axis: Any, chart: Chart) -> None:
    pad = 12.0
    if chart.epoch_length is not None:
        length = chart.epoch_length
        top = axis.secondary_xaxis("top", functions=(lambda x: x / length, lambda x: x * length))
        top.xaxis.get_major_locator().set_params(integer=True)
        top.set_xlabel("epoch", color=_GREY)
        top.spines["top"].set_visible(True)
        pad += 34.0
    if chart.subtitle:
        axis.annotate(
            chart.subtitle, (0, 1), (0, pad), xycoords="axes fraction", textcoords="offset points", color=_GREY,
        )  # fmt: skip
        pad += 18.0
    axis.set_title(chart.title, loc="left", pad=pad, fontsize=13, fontweight="bold", color="#111827")
