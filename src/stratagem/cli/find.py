"""Implement ``stratagem find``: search for a learning rate or a batch size with trial runs that write no files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from rich.console import Console

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json
from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Mark, Panel, wants_log_scale
from stratagem.cli.plot.png import write_png
from stratagem.config import Config
from stratagem.data import EpochLoader
from stratagem.runner import Runner
from stratagem.strategies import BaseStrategy
from stratagem.train.tools import BatchSearch, LearningRateSweep, find_batch_size, find_learning_rate

__all__ = ["Sweep", "batch_size", "learning_rate"]

# Sections that a trial run does not need, or that would change its learning rates.
_REMOVED = (
    "param_scheduler", "custom_hooks", "val_dataloader", "val_cfg", "val_evaluator",
    "test_dataloader", "test_cfg", "test_evaluator", "limit_val_batches", "limit_test_batches", "trackers",
)  # fmt: skip
_MEBIBYTE = 2**20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The options of ``stratagem find lr``.

    Attributes:
        low: the first learning rate.
        high: the last learning rate.
        steps: the number of optimizer steps.
        loss: the name of the logged value that is used as the loss.
        optimizer: the name of the optimizer, if there are several.
    """

    low: float
    high: float
    steps: int
    loss: str
    optimizer: str | None


def learning_rate(options: RunOptions, sweep: Sweep, *, out: Path | None, as_json: bool = False) -> None:
    """Plot the loss over an increasing learning rate, and print the suggested learning rates.

    Raises:
        ConfigError: or a subclass, if the configuration or an option is invalid.
        typer.Exit: with the exit status of the first rank that failed, if ``--nproc`` started ranks.
    """
    config = read_config(options)
    if options.nproc is not None:
        launch_ranks(options.nproc, by=options.launcher)
        return
    with _temporary_run(config) as (strategy, dataloader):
        found = find_learning_rate(
            strategy,
            dataloader,
            low=sweep.low,
            high=sweep.high,
            steps=sweep.steps,
            loss=sweep.loss,
            optimizer=sweep.optimizer,
        )
        if strategy.rank == 0:
            _show(_loss_chart(str(options.config), found, sweep), out, quiet=as_json)
            print_json(_rates_as_json(found)) if as_json else echo(_table_of_rates(found))


def batch_size(options: RunOptions, *, limit: int | None, steps: int, out: Path | None, as_json: bool = False) -> None:
    """Plot the throughput over the batch size, and print the largest batch size that fits.

    Args:
        options: the configuration.
        limit: the largest batch size to try; None for no limit on accelerators and 1024 on the CPU.
        steps: the number of iterations per measurement.
        out: the PNG file to write, if any.
        as_json: whether to print JSON instead of the plot and the table.

    Raises:
        ConfigError: or a subclass, if the configuration or an option is invalid.
    """
    with _temporary_run(read_config(options)) as (strategy, dataloader):
        found = find_batch_size(strategy, dataloader, limit=limit, steps=steps)
        on_cpu = strategy.world.device.type == "cpu"
        if found.largest is not None:
            _show(_throughput_chart(str(options.config), found), out, quiet=as_json)
        if as_json:
            print_json({**asdict(found), "out_of_memory": found.out_of_memory})
            return
        echo(_table_of_sizes(found))
        echo(_verdict(found, on_cpu=on_cpu))


@contextmanager
def _temporary_run(config: Config) -> Iterator[tuple[BaseStrategy, EpochLoader]]:
    """Prepare a training run for the configuration in a temporary folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="stratagem-find-") as folder:
        changes: dict[str, Any] = {"work_dir": folder, "resume": False, "log_level": "WARNING"}
        changes |= {key: None for key in _REMOVED if key in config}
        section = config.get("strategy")
        if isinstance(section, Mapping) and "work_dir" in section:
            changes["strategy.work_dir"] = folder
        config.merge_from_dict(changes, source="stratagem find")
        runner = Runner.from_cfg(config)
        try:
            loop = runner.prepare()
            yield runner.strategy, loop.dataloader
        finally:
            runner.close()


def _show(chart: Chart, out: Path | None, *, quiet: bool) -> None:
    if out is not None:
        write_png(chart, out)
    if quiet:
        return
    print_chart(chart, Console())
    if out is not None:
        echo(f"Saved the chart to {out}")


def _loss_chart(name: str, found: LearningRateSweep, sweep: Sweep) -> Chart:
    marks = tuple(Mark(label=label, x=rate) for label, rate in _suggestions(found).items())
    lines = (
        Line(label="smoothed", x=found.rates, y=found.smoothed),
        Line(label="each step", x=found.rates, y=found.losses, faint=True),
    )
    outcome = "stopped because the loss diverged" if found.diverged else "completed"
    return Chart(
        title=f"{name}: learning-rate range test",
        subtitle=f"{len(found.rates)} of {sweep.steps} optimizer steps, {outcome}",
        x_label="learning rate",
        x_range=(float(found.rates[0]), float(found.rates[-1])),
        panels=(Panel(label=sweep.loss, lines=lines, marks=marks),),
        log_x=True,
    )


def _suggestions(found: LearningRateSweep) -> dict[str, float]:
    named = {"steepest descent": found.steepest, "minimum / 10": found.below_minimum}
    return {label: rate for label, rate in named.items() if rate is not None}


def _rates_as_json(found: LearningRateSweep) -> dict[str, object]:
    return {
        "rates": found.rates.tolist(),
        "losses": found.losses.tolist(),
        "smoothed": found.smoothed.tolist(),
        "diverged": found.diverged,
        "lowest_loss": found.least,
        "steepest_descent": found.steepest,
        "below_minimum": found.below_minimum,
    }


def _table_of_rates(found: LearningRateSweep) -> str:
    if found.least is None:
        return (
            "The loss did not decrease at any learning rate, so none is suggested. Try a smaller --min or more --steps."
        )
    rows = {}
    for label, rate in {"lowest loss": found.least, **_suggestions(found)}.items():
        at = int(np.abs(np.log(found.rates / rate)).argmin())
        rows[label] = f"{rate:.2e}  smoothed loss {found.smoothed[at]:.4g}"
    width = max(map(len, rows))
    lines = [f"  {label:<{width}}  {value}" for label, value in rows.items()]
    lines.append("The suggestions are starting points; compare them in full training runs.")
    return "\n".join(["Learning rates", *lines])


def _throughput_chart(name: str, found: BatchSearch) -> Chart:
    fitting = [trial for trial in found.trials if trial.seconds is not None]
    line = Line(
        label="",
        x=np.asarray([trial.batch_size for trial in fitting]),
        y=np.asarray([trial.throughput for trial in fitting]),
    )
    marks = () if found.knee is None else (Mark(label=f"knee: {found.knee} samples", x=found.knee),)
    return Chart(
        title=f"{name}: throughput by batch size",
        subtitle="excluding data loading",
        x_label="batch size",
        x_range=(1.0, float(max(2, fitting[-1].batch_size))),
        panels=(Panel(label="samples/s", lines=(line,), marks=marks, log=wants_log_scale((line,))),),
        log_x=True,
    )


def _table_of_sizes(found: BatchSearch) -> str:
    with_memory = any(trial.memory is not None for trial in found.trials)
    lines = [f"{'batch size':>10}  {'ms/iteration':>12}  {'samples/s':>10}" + ("  peak MiB" if with_memory else "")]
    for trial in found.trials:
        memory = "" if trial.memory is None else f"  {trial.memory / _MEBIBYTE:>8,.0f}"
        if trial.seconds is None:
            lines.append(f"{trial.batch_size:>10}  {'out of memory':>24}{memory}")
        else:
            lines.append(f"{trial.batch_size:>10}  {1e3 * trial.seconds:>12.2f}  {trial.throughput:>10,.0f}{memory}")
    return "\n".join(lines)


def _verdict(found: BatchSearch, *, on_cpu: bool) -> str:
    if found.largest is None:
        return "Out of memory with a batch of one sample."
    lines = []
    if found.out_of_memory:
        lines.append(
            f"The largest batch size that fits is {found.largest}. Leave some headroom: memory fragments in long runs, and "
            "other batches may need more."
        )
    else:
        lines.append(f"All batch sizes up to the limit of {found.limit} fit.")
    if on_cpu:
        lines.append(
            "The largest batch size cannot be determined on the CPU: the system swaps or kills the process instead of "
            "raising an out-of-memory error. Only the throughput is measured."
        )
    lines.append(
        f"The knee is at {found.knee}: the smallest batch size tried that reaches 90 % of the highest throughput."
    )
    return "\n".join(lines)
