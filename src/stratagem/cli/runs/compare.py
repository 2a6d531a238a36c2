"""Implement ``stratagem runs compare``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from stratagem.cli.output import Table, echo, print_json, print_table
from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Panel, wants_log_scale
from stratagem.cli.plot.png import write_png
from stratagem.cli.runs.metrics import facts_of, metrics_of, speed_of
from stratagem.config import changed_paths
from stratagem.errors import ConfigValueError
from stratagem.report.collect import KEYS_OF_RESUMING, RunFacts
from stratagem.utils import did_you_mean

__all__ = ["compare"]

# Without --metric, at most this many curves are plotted.
_MOST_PANELS = 3


def compare(paths: Sequence[Path], *, metrics: Sequence[str], out: Path | None, as_json: bool = False) -> None:
    """Print the metrics, the speed and the differing configuration values of runs side by side, and plot their curves.

    Args:
        paths: the work directories of the runs, or the folders of sessions.
        metrics: the names of the values to plot, such as ``val/accuracy``; empty to plot the loss and the metrics.
        out: the PNG file to write, if any.
        as_json: whether to print JSON instead.

    Raises:
        CheckpointNotFoundError: if a folder does not contain a run.
        ConfigValueError: if there are fewer than two runs, or no run has a value.
    """
    if len(paths) < 2:
        raise ConfigValueError(f"runs compare needs two or more runs, got {len(paths)}.")
    runs = facts_of(paths)
    rows = {"results": dict(_results(runs)), "configuration": dict(_configuration(runs))}
    chart = _chart(runs, metrics)
    if out is not None and chart is not None:
        write_png(chart, out)
    if as_json:
        print_json({"runs": [each.name for each in runs], **rows})
        return
    for title, values in rows.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title, overflow="fold")
        for run in runs:
            table.add_column(run.name, justify="right" if title == "results" else "left", overflow="fold")
        for name, cells in values.items():
            table.add_row(name, *("" if cell is None else _text(cell) for cell in cells))
        print_table(table) if values else echo(f"{title}: no differences")
        echo("")
    if chart is not None:
        print_chart(chart, Console())
    if out is not None:
        echo(f"Saved the chart to {out}" if chart is not None else "There are no values to plot.")


def _text(cell: object) -> str:
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def _results(runs: Sequence[RunFacts]) -> Iterator[tuple[str, list[object]]]:
    """Yield a row of values for each result, one value for each run."""
    yield "state", [each.sessions[-1].how for each in runs]
    yield "iterations", [each.records.last_iter for each in runs]
    yield "sessions", [len(each.sessions) for each in runs]
    measured = [{metric.name: metric for metric in metrics_of(each)} for each in runs]
    for name in dict.fromkeys(name for each in measured for name in each):
        found = [each.get(name) for each in measured]
        yield name, [None if metric is None else metric.last for metric in found]
        if any(metric is not None and metric.best is not None for metric in found):
            yield f"{name}, best", [None if metric is None else metric.best for metric in found]
            yield f"{name}, best at", [None if metric is None else metric.best_at for metric in found]
    speeds = [speed_of(each) for each in runs]
    for name in dict.fromkeys(speed[0] for speed in speeds if speed is not None):
        yield name, [speed[1] if speed is not None and speed[0] == name else None for speed in speeds]
    if any(each.goodput is not None for each in runs):
        yield "wall time (s)", [None if each.goodput is None else round(each.goodput.wall, 1) for each in runs]
        yield "goodput", [None if each.goodput is None else round(each.goodput.share, 4) for each in runs]


def _configuration(runs: Sequence[RunFacts]) -> Iterator[tuple[str, list[object]]]:
    """Yield the values of the configurations that are not equal in all runs."""
    changed = [changed_paths(runs[0].config, each.config, ignored=KEYS_OF_RESUMING) for each in runs[1:]]
    for path in dict.fromkeys(path for each in changed for path in each):
        first = next(each[path][0] for each in changed if path in each)
        yield path, [first, *(each[path][1] if path in each else first for each in changed)]


def _chart(runs: Sequence[RunFacts], metrics: Sequence[str]) -> Chart | None:
    """Return the curves of the runs; None if they have none.

    Raises:
        ConfigValueError: if no run has one of the requested values.
    """
    known = list(dict.fromkeys(f"{mode}/{name}" for run in runs for mode, name in run.records.curves))
    for name in metrics:
        if name not in known:
            raise ConfigValueError(f"--metric {name}: no run has logged this value. {did_you_mean(name, known)}")
    wanted = metrics or [name for run in runs for name in (metric.name for metric in metrics_of(run))]
    panels = []
    for name in list(dict.fromkeys(wanted))[: None if metrics else _MOST_PANELS]:
        lines = tuple(line for run in runs if (line := _line(run, name)) is not None)
        if lines:
            panels.append(Panel(label=name, lines=lines, log="loss" in name and wants_log_scale(lines)))
    if not panels:
        return None
    ends = [float(line.x[-1]) for panel in panels for line in panel.lines]
    begins = [float(line.x[0]) for panel in panels for line in panel.lines]
    return Chart(
        title=" and ".join(each.name for each in runs) if len(runs) == 2 else f"{len(runs)} runs",
        x_label="iteration",
        x_range=(min(begins), max(ends)),
        panels=tuple(panels),
    )


def _line(run: RunFacts, name: str) -> Line | None:
    mode, _, key = name.partition("/")
    curve = run.records.curves.get((mode, key))
    points = curve.points() if curve is not None else []
    if not points:
        return None
    x, y = (np.array(each, dtype=np.float64) for each in zip(*points, strict=True))
    return Line(label=run.name, x=x, y=y)
