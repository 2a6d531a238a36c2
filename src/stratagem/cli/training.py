"""``stratagem train``."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import typer

from stratagem.cli.handover import NPROC_VARIABLE
from stratagem.cli.launching import launch_again
from stratagem.cli.options import RunOptions, read_config
from stratagem.config import Config
from stratagem.dist import infer_launcher
from stratagem.runner import Runner

__all__ = ["train"]


def train(options: RunOptions, *, resume: str | None, load_from: str | None) -> None:
    """Train, here or in processes that are started for it, and say how it ended.

    Raises:
        typer.Exit: with 128 plus the signal's number, if the training was interrupted.
    """
    config = read_config(options)
    if options.nproc is not None:
        launch_again(options.nproc, by=options.launcher)
        return
    if resume is not None:
        config.merge_from_dict({"resume": True if resume == "auto" else resume}, source="--resume")
    if load_from is not None:
        config.merge_from_dict({"load_from": load_from}, source="--load-from")
    began = time.monotonic()
    runner = Runner.from_cfg(config)
    try:
        runner.train()
        if runner.strategy.rank == 0:
            typer.echo(_summary(runner, config, options, time.monotonic() - began))
    finally:
        runner.close()
    if runner.interrupted is not None:
        raise typer.Exit(128 + runner.interrupted)


def _summary(runner: Runner, config: Config, options: RunOptions, seconds: float) -> str:
    run = runner.run
    if runner.interrupted is not None:
        lines = [f"Interrupted after {run.iter} of {run.max_iters} iterations."]
        again = _command(options, "--resume")
        how = "continue"
    else:
        lines = [f"Trained {_length(runner)}; this start took {timedelta(seconds=round(seconds))}."]
        key, length = ("max_epochs", run.max_epochs) if run.max_epochs else ("max_iters", run.max_iters or 0)
        key = f"train_cfg.{key}"
        others = tuple(each for each in options.overrides if each.partition("=")[0].strip() != key)
        again = _command(replace(options, overrides=(*others, f"{key}={length * 2}")), "--resume")
        how = "train on"
    rows = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in run.metrics.items()}
    checkpoint = runner.latest_checkpoint()
    if checkpoint is not None:
        rows["checkpoint"] = _near(checkpoint)
        if config.get("test_cfg") is not None:
            rows["test"] = _command(options, command="test", after=(_near(checkpoint),))
    rows["logs"] = _near(Path(run.log_dir))
    rows[how] = again
    width = max(map(len, rows))
    return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _length(runner: Runner) -> str:
    run = runner.run
    iterations = _count(run.iter, "iteration")
    return f"{_count(run.epoch, 'epoch')} ({iterations})" if run.max_epochs is not None else iterations


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _near(path: Path) -> str:
    """Return a path as it is shortest to type."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _command(options: RunOptions, *further: str, command: str = "train", after: tuple[str, ...] = ()) -> str:
    """Return the command that runs this configuration again, as it was called."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        called = ["python", "-m", "stratagem"]
    else:
        called = [_near(program)] if program.name == "stratagem" and program.parent.name == "bin" else ["stratagem"]
    words = [*called, command, str(options.config), *after]
    words += [word for override in options.overrides for word in ("--set", override)]
    if options.work_dir is not None:
        words += ["--work-dir", str(options.work_dir)]
    launcher = "ray" if infer_launcher() == "ray" else options.launcher
    if launcher is not None:
        words += ["--launcher", launcher]
    if options.strategy is not None:
        words += ["--strategy", options.strategy]
    size = os.environ.get(NPROC_VARIABLE)
    if size is not None:
        words += ["--nproc", size]
    return " ".join([shlex.join(words), *further])
