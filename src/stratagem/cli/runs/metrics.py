"""The progress, the metrics and the speed of runs, as tables show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import final

from stratagem.cli.output import Table, print_json, print_table
from stratagem.errors import CheckpointNotFoundError, ConfigValueError
from stratagem.report.collect import RunFacts, collect, find_runs
from stratagem.report.decimation import Curve
from stratagem.train.hooks.best_scores import infer_rule

__all__ = ["Metric", "facts_of", "list_metrics", "metrics_of", "speed_of"]

# The curves that show how fast a run trains, from the one that depends least on the configuration.
_SPEEDS = ("samples_per_second", "steps_per_second")
_LOSS = "loss"


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of a run.

    Attributes:
        name: its name, such as ``val/accuracy``.
        last: its last value.
        best: its best value, if its name shows whether greater or smaller values are better.
        best_at: the iteration of the best value.
    """

    name: str
    last: float | None
    best: float | None = None
    best_at: int | None = None


def metrics_of(facts: RunFacts) -> Iterator[Metric]:
    """Yield the loss of the training, and all metrics of evaluations."""
    curves = facts.records.curves
    if ("train", _LOSS) in curves:
        yield Metric(f"train/{_LOSS}", curves["train", _LOSS].last)
    for (mode, name), curve in curves.items():
        if mode != "train":
            yield Metric(f"{mode}/{name}", curve.last, *_best(name, curve))


def _best(name: str, curve: Curve) -> tuple[float | None, int | None]:
    values = [(value, int(x)) for x, value in curve.points()]
    try:
        choose = max if infer_rule(name) == "greater" else min
    except ConfigValueError:
        return None, None
    # The first one of several equal values.
    return choose(values, key=lambda each: each[0], default=(None, None))


def speed_of(facts: RunFacts) -> tuple[str, float] | None:
    """Return the name and the median of the curve of the speed; None if it was not logged."""
    for name in _SPEEDS:
        curve = facts.records.curves.get(("train", name))
        values = [value for _, value in curve.points()] if curve is not None else []
        if values:
            return name, median(values)
    return None


def facts_of(paths: Sequence[Path]) -> list[RunFacts]:
    """Collect the facts of runs, with names that tell them apart."""
    found = [collect(path) for path in paths]
    names = [each.name for each in found]
    for each, path in zip(found, paths, strict=True):
        if names.count(each.name) > 1:
            each.name = str(path)
    return found


def list_metrics(folder: Path, *, as_json: bool = False) -> None:
    """Print a table of the runs in a folder: their progress, goodput, speed and metrics.

    Raises:
        CheckpointNotFoundError: if there are no runs.
    """
    paths = find_runs(folder)
    if not paths:
        raise CheckpointNotFoundError(f"No run found in {folder} or its subfolders.")
    runs = facts_of(paths)
    if as_json:
        print_json([_as_json(each) for each in runs])
        return
    measured = [{metric.name: metric for metric in metrics_of(each)} for each in runs]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state"):
        table.add_column(heading, overflow="fold")
    names = list(dict.fromkeys(name for each in measured for name in each))
    for heading in ("iter", "goodput", "samples/s", *names):
        table.add_column(heading, justify="right")
    for each, metrics in zip(runs, measured, strict=True):
        speed = speed_of(each)
        cells = [_value_and_best(metrics.get(name)) for name in names]
        table.add_row(
            each.name, each.sessions[-1].how, str(each.records.last_iter), _percent(each),
            f"{speed[1]:.5g}" if speed is not None and speed[0] == _SPEEDS[0] else "", *cells,
        )  # fmt: skip
    print_table(table)


def _as_json(facts: RunFacts) -> dict[str, object]:
    speed = speed_of(facts)
    return {
        "run": facts.name,
        "state": facts.sessions[-1].how,
        "iter": facts.records.last_iter,
        "epoch": facts.records.last_epoch,
        "sessions": len(facts.sessions),
        "goodput": None if facts.goodput is None else facts.goodput.share,
        "speed": None if speed is None else {speed[0]: speed[1]},
        "metrics": {
            metric.name: {"last": metric.last, "best": metric.best, "best_at": metric.best_at}
            for metric in metrics_of(facts)
        },
    }


def _percent(facts: RunFacts) -> str:
    return "" if facts.goodput is None else f"{100 * facts.goodput.share:.0f} %"


def _value_and_best(metric: Metric | None) -> str:
    if metric is None or metric.last is None:
        return ""
    if metric.best is None or metric.best == metric.last:
        return f"{metric.last:.5g}"
    return f"{metric.last:.5g} (best {metric.best:.5g})"
