"""Implement ``stratagem schedule``: plot the scheduled options of a run without training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json
from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Panel, wants_log_scale
from stratagem.cli.plot.png import write_png
from stratagem.config import Config, require
from stratagem.config_schema import SECTIONS
from stratagem.data import BatchLimits
from stratagem.errors import ConfigKeyError
from stratagem.registry import switch_scope
from stratagem.strategies.setup.building import with_preprocessor
from stratagem.train.tools.schedule_preview import Course, RunPreview, preview_run

__all__ = ["schedule"]

_NEEDED = ("model", "train_dataloader", "train_cfg", "optim_wrapper")
_LABELS = {"lr": "learning rate", "weight_decay": "weight decay"}


def schedule(options: RunOptions, *, out: Path | None, as_json: bool = False) -> None:
    """Plot the learning rate of a run, and all other options that a schedule changes.

    Args:
        options: the configuration; ``nproc`` is the run's number of processes.
        out: the PNG file to write, if any.
        as_json: whether to print the values as JSON instead of the plot.

    Raises:
        ConfigKeyError: if the configuration lacks a section that training needs, or has an unknown key.
        MissingDependencyError: if ``out`` is given and matplotlib is not installed.
    """
    config = read_config(options)
    require(config, SECTIONS, scope=config.get("default_scope"))
    found = preview(config, world_size=options.nproc or 1)
    chart = draw(str(options.config), found, world_size=options.nproc or 1)
    if out is not None:
        write_png(chart, out)
    if as_json:
        print_json(_as_json(found))
        return
    print_chart(chart, Console())
    if out is not None:
        echo(f"Saved the chart to {out}")


def _as_json(found: RunPreview) -> dict[str, object]:
    return {
        "iterations": found.iterations.tolist(),
        "max_iters": found.max_iters,
        "epoch_length": found.epoch_length,
        "options": [
            {
                "optimizer": course.optimizer or None,
                "option": course.key,
                "parameters": list(course.parameters),
                "values": course.values.tolist(),
            }
            for course in found.courses
        ],
    }


def preview(config: Config, *, world_size: int) -> RunPreview:
    """Return the values of a configuration's scheduled options over the run.

    Raises:
        ConfigKeyError: if the configuration lacks a section that training needs.
    """
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ConfigKeyError(
            f"{config.filename or 'The configuration'} has no {', '.join(missing)}, which training requires."
        )
    with switch_scope(config.get("default_scope")):
        return preview_run(
            with_preprocessor(config["model"], config.get("data_preprocessor")),
            optim_wrapper=config["optim_wrapper"],
            train_dataloader=config["train_dataloader"],
            train_cfg=config["train_cfg"],
            param_scheduler=config.get("param_scheduler"),
            auto_scale_lr=config.get("auto_scale_lr"),
            world_size=world_size,
            limits=BatchLimits(
                limit_train_batches=config.get("limit_train_batches"), overfit_batches=config.get("overfit_batches")
            ),
        )


def draw(name: str, run_preview: RunPreview, *, world_size: int) -> Chart:
    """Return a chart with one panel for each learning rate and each other option that a schedule changes."""
    by_option: dict[tuple[str, str], list[Course]] = {}
    for course in run_preview.courses:
        by_option.setdefault((course.optimizer, course.key), []).append(course)
    waiting = {(optimizer, key) for optimizer, key, _ in run_preview.on_metrics}
    drawn = {
        option: courses
        for option, courses in by_option.items()
        if option[1] == "lr" or option in waiting or any(course.changes for course in courses)
    }
    constant = {option: courses for option, courses in by_option.items() if option not in drawn}
    return Chart(
        title=name,
        subtitle=_length(run_preview, world_size),
        x_label=_unit(run_preview),
        x_range=(0, run_preview.max_iters),
        panels=tuple(_panel(option, courses, run_preview) for option, courses in drawn.items()),
        notes=tuple(_notes(run_preview, constant)),
        epoch_length=run_preview.epoch_length,
    )


def _panel(option: tuple[str, str], courses: list[Course], run_preview: RunPreview) -> Panel:
    lines = tuple(Line(label=_label(course), x=run_preview.iterations, y=course.values) for course in courses)
    return Panel(label=_name(*option), lines=lines, log=wants_log_scale(lines))


def _label(course: Course) -> str:
    if course.whole:
        return ""
    first, *others = course.parameters
    return f"{first} and {len(others)} more" if others else first


def _name(optimizer: str, key: str) -> str:
    name = _LABELS.get(key, key)
    return f"{optimizer}: {name}" if optimizer else name


def _length(run_preview: RunPreview, world_size: int) -> str:
    parts = [f"{run_preview.max_iters:,} iterations"]
    if run_preview.epoch_length is not None:
        parts.append(f"{run_preview.max_iters / run_preview.epoch_length:.4g} epochs of {run_preview.epoch_length:,}")
    if world_size > 1:
        parts.append(f"{world_size} processes")
    return ", ".join(parts)


def _unit(run_preview: RunPreview) -> str:
    counts = {name: count for name, count in run_preview.accumulative_counts.items() if count > 1}
    if not counts:
        return "iteration"
    steps = ", ".join(f"{name + ' ' if name else ''}every {count}" for name, count in counts.items())
    return f"iteration (micro-batch; optimizer step {steps})"


def _notes(run_preview: RunPreview, constant: dict[tuple[str, str], list[Course]]) -> Iterator[str]:
    yield from run_preview.scaling
    for optimizer, key, kind in run_preview.on_metrics:
        yield f"{kind} depends on validation metrics, so {_name(optimizer, key)} is plotted without it."
    values = [
        f"{_name(*option)} {' or '.join(dict.fromkeys(f'{course.values[0]:g}' for course in courses))}"
        for option, courses in constant.items()
    ]
    if values:
        yield f"Constant: {', '.join(values)}."
