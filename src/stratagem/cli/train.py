"""``stratagem train``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import typer

from stratagem.cli.launch.child_status import NPROC_VARIABLE, RESTARTS_VARIABLE
from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.config import Config
from stratagem.distributed import infer_launcher
from stratagem.errors import RankFailedError
from stratagem.runner import Runner
from stratagem.train.run.hard_exit import exit_after
from stratagem.train.run.signals import signals
from stratagem.utils import mask_text

__all__ = ["train"]

# How long a rank that failed may take to close what it has open.
_SHUTDOWN_GRACE_S = 10.0
# Said for one start of a run; the next one goes on as it was saved.
_OWN_SCHEDULES = "resume_param_scheduler"


def train(options: RunOptions, *, resume: str | None, load_from: str | None) -> None:
    """Train, here or in processes that are started for it, and say how it ended.

    Raises:
        typer.Exit: with 128 plus the signal's number, if the training was interrupted.
        RankFailedError: if another rank failed, which tells its error itself.
    """
    if options.nproc is not None:
        # Told here, once, before any process is started.
        read_config(options)
        launch_ranks(options.nproc, by=options.launcher, max_restarts=options.max_restarts)
        return
    # From here on a signal asks to stop, also while the ranks still meet.
    with signals.listening():
        try:
            interrupted = _train(options, resume=resume, load_from=load_from)
        except KeyboardInterrupt:
            typer.echo("Stopped at once by a second signal; the last published checkpoint is whole.", err=True)
            interrupted = signals.second or signal.SIGINT
    if interrupted is not None:
        raise typer.Exit(128 + interrupted)


def _train(options: RunOptions, *, resume: str | None, load_from: str | None) -> int | None:
    """Return the number of the signal that ended the run; None where none did."""
    config = read_config(options)
    if resume is not None:
        config.merge_from_dict({"resume": True if resume == "auto" else resume}, source="--resume")
    if load_from is not None:
        config.merge_from_dict({"load_from": load_from}, source="--load-from")
    began = time.monotonic()
    runner = Runner.from_cfg(config)
    try:
        _train_until_stopped(runner)
        if runner.strategy.rank == 0:
            # It names the command to continue with, and so what was given by --set.
            typer.echo(mask_text(_summary(runner, config, options, time.monotonic() - began)))
    except BaseException as error:
        if runner.strategy.world_size > 1:
            # Ending the group can wait for a rank that does not answer.
            exit_after(_SHUTDOWN_GRACE_S, getattr(error, "exit_status", 1))
        failure, rank = runner.run.guard.failure, runner.strategy.rank
        if isinstance(error, Exception) and failure is not None and failure.rank != rank:
            # That rank tells the error, once for all.
            raise RankFailedError(runner.run.guard.reason(rank)) from error
        raise
    finally:
        runner.close()
    return runner.interrupted


def _train_until_stopped(runner: Runner) -> None:
    """Train to the end, or until a signal has stopped the run and it is saved."""
    try:
        runner.train()
    except (KeyboardInterrupt, SystemExit):
        if not runner.run.interrupt.passed_on:
            raise


def _summary(runner: Runner, config: Config, options: RunOptions, seconds: float) -> str:
    run = runner.run
    options = replace(options, overrides=_without(options.overrides, _OWN_SCHEDULES))
    if runner.interrupted is not None:
        lines = [f"Interrupted after {run.iter} of {run.max_iters} iterations."]
        again = _command(options, "--resume")
        how = "continue"
    else:
        lines = [f"Trained {_length(runner)}; this start took {timedelta(seconds=round(seconds))}."]
        key, length = ("max_epochs", run.max_epochs) if run.max_epochs else ("max_iters", run.max_iters or 0)
        key = f"train_cfg.{key}"
        longer = (*_without(options.overrides, key), f"{key}={length * 2}")
        # Schedules that were saved have ended.
        scheduled = config.get("param_scheduler") is not None
        longer = (*longer, f"{_OWN_SCHEDULES}=False") if scheduled else longer
        again = _command(replace(options, overrides=longer), "--resume")
        how = "train on"
    rows = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in run.metrics.items()}
    checkpoint = runner.latest_checkpoint()
    if checkpoint is not None:
        rows["checkpoint"] = _near(checkpoint)
        if config.get("test_cfg") is not None:
            rows["test"] = _command(options, command="test", after=(_near(checkpoint),))
        if config.get("tokenizer") is not None:
            # One process writes, however many trained.
            rows["sample"] = f"{shlex.join(_words(options, 'sample', _near(checkpoint)))} --prompt TEXT"
    rows["logs"] = _near(Path(run.log_dir))
    rows[how] = again
    width = max(map(len, rows))
    return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _without(overrides: tuple[str, ...], key: str) -> tuple[str, ...]:
    return tuple(each for each in overrides if each.partition("=")[0].strip() != key)


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
    words = _words(options, command, *after)
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
    restarts = os.environ.get(RESTARTS_VARIABLE)
    if restarts is not None:
        words += ["--max-restarts", restarts]
    return " ".join([shlex.join(words), *further])


def _words(options: RunOptions, command: str, *after: str) -> list[str]:
    """Return the words of a command on this configuration, with the values that were set."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        called = ["python", "-m", "stratagem"]
    else:
        called = [_near(program)] if program.name == "stratagem" and program.parent.name == "bin" else ["stratagem"]
    overrides = (word for override in options.overrides for word in ("--set", override))
    return [*called, command, str(options.config), *after, *overrides]
