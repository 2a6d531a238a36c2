"""Implement ``stratagem train``."""

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

from stratagem.cli.launch.child_status import RESTARTS_VARIABLE
from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo
from stratagem.config import Config
from stratagem.config_schema import require_valid
from stratagem.distributed import infer_launcher
from stratagem.errors import RankFailedError
from stratagem.runner import Runner, runner_arguments
from stratagem.train import Run
from stratagem.train.run.closing import closing_rows, closing_summary, relative_path, trained_length
from stratagem.train.run.hard_exit import exit_after
from stratagem.train.run.signals import signals
from stratagem.train.tools.dry_run import dry_run as try_all_parts
from stratagem.utils import mask_text
from stratagem.utils.launch_variables import NPROC_VARIABLE

__all__ = ["train"]

# The time that a failed rank has to shut down before it is terminated.
_SHUTDOWN_GRACE_S = 10.0
# This option applies only to the current session, so suggested commands omit it.
_RESUME_SCHEDULES = "resume_param_scheduler"


def train(options: RunOptions, *, resume: str | None, load_from: str | None, dry_run: bool = False) -> None:
    """Train in this process, or in the ranks that ``--nproc`` starts, and print a summary on rank 0.

    Args:
        options: the configuration, and where to run it.
        resume: the checkpoint to resume from, ``"auto"`` for the latest one of the run, or None.
        load_from: the checkpoint whose weights initialize the model, or None.
        dry_run: try all parts of the run in a temporary folder instead, and print what was tried.

    Raises:
        typer.Exit: with 128 plus the number of the signal that interrupted the run, or with the exit status of the
            first rank that failed.
        RankFailedError: if a different rank failed. The failed rank prints its own error.
    """
    if options.nproc is not None:
        # Report errors in the configuration once, before starting any process.
        read_config(options)
        launch_ranks(options.nproc, by=options.launcher, max_restarts=options.max_restarts)
        return
    # From here on, a signal requests a stop, even during the rendezvous.
    with signals.listening():
        try:
            interrupted = _train(options, resume=resume, load_from=load_from, dry_run=dry_run)
        except KeyboardInterrupt:
            echo("Stopped immediately by a second signal. The last saved checkpoint is intact.", err=True)
            interrupted = signals.second or signal.SIGINT
    if interrupted is not None:
        raise typer.Exit(128 + interrupted)


def _train(options: RunOptions, *, resume: str | None, load_from: str | None, dry_run: bool) -> int | None:
    """Train in this process. Return the number of the signal that interrupted the run, or None."""
    config = read_config(options)
    if resume is not None:
        config.merge_from_dict({"resume": True if resume == "auto" else resume}, source="--resume")
    if load_from is not None:
        config.merge_from_dict({"load_from": load_from}, source="--load-from")
    if dry_run:
        _try_run(config)
        return None
    began = time.monotonic()
    runner = Runner.from_cfg(config)
    try:
        _train_until_stopped(runner)
        if runner.strategy.rank == 0:
            # The suggested commands contain the values of --set, which may be secrets.
            echo(mask_text(_summary(runner, config, options, time.monotonic() - began)))
    except BaseException as error:
        if runner.strategy.world_size > 1:
            # Destroying the process group can block if another rank does not respond.
            exit_after(_SHUTDOWN_GRACE_S, getattr(error, "exit_status", 1))
        failure, rank = runner.run.guard.failure, runner.strategy.rank
        if isinstance(error, Exception) and failure is not None and failure.rank != rank:
            # The failed rank prints the error.
            raise RankFailedError(runner.run.guard.reason(rank)) from error
        raise
    finally:
        runner.close()
    return runner.interrupted


def _try_run(config: Config) -> None:
    """Try all parts of the run, and print what was tried on rank 0."""
    require_valid(config)
    tried = try_all_parts(Runner, runner_arguments(config))
    if tried.rank == 0:
        echo(tried.describe())


def _train_until_stopped(runner: Runner) -> None:
    """Train until the run is complete, or until a signal has stopped it and a checkpoint is saved."""
    try:
        runner.train()
    except (KeyboardInterrupt, SystemExit):
        if not runner.run.interrupt.passed_on:
            raise


def _summary(runner: Runner, config: Config, options: RunOptions, seconds: float) -> str:
    run = runner.run
    options = replace(options, overrides=_without(options.overrides, _RESUME_SCHEDULES))
    if runner.interrupted is not None:
        headline = f"Interrupted after {run.iter} of {run.max_iters} iterations."
        next_command = _command(options, "--resume")
        label = "continue"
    else:
        headline = f"Trained {trained_length(run)}; this session took {timedelta(seconds=round(seconds))}."
        key, length = _length(run, config)
        longer = (*_without(options.overrides, key), f"{key}={length * 2}")
        # The saved schedules have reached their end, so an extended run uses the configured schedules.
        scheduled = config.get("param_scheduler") is not None
        longer = (*longer, f"{_RESUME_SCHEDULES}=False") if scheduled else longer
        next_command = _command(replace(options, overrides=longer), "--resume")
        label = "extend"
    rows = closing_rows(run)
    checkpoint = rows.get("checkpoint")
    if checkpoint is not None and config.get("test_cfg") is not None:
        rows["test"] = _command(options, command="test", after=(checkpoint,))
    if checkpoint is not None and config.get("tokenizer") is not None:
        # Sampling uses one process, so the command has no launcher options.
        rows["sample"] = f"{shlex.join(_command_words(options, 'sample', checkpoint))} --prompt TEXT"
    rows[label] = next_command
    return closing_summary(headline, rows)


def _length(run: Run, config: Config) -> tuple[str, int]:
    """Return the key that determines the length of the run, and its value."""
    steps = (config.get("train_cfg") or {}).get("max_steps")
    if steps is not None:
        return "train_cfg.max_steps", int(steps)
    if run.max_epochs:
        return "train_cfg.max_epochs", run.max_epochs
    return "train_cfg.max_iters", run.max_iters or 0


def _without(overrides: tuple[str, ...], key: str) -> tuple[str, ...]:
    return tuple(each for each in overrides if each.partition("=")[0].strip() != key)


def _command(options: RunOptions, *flags: str, command: str = "train", after: tuple[str, ...] = ()) -> str:
    """Return a command for this configuration with this command's options.

    Args:
        options: the options of this command.
        flags: words to append unquoted.
        command: the name of the command.
        after: positional arguments after the configuration.
    """
    words = _command_words(options, command, *after)
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
    return " ".join([shlex.join(words), *flags])


def _command_words(options: RunOptions, command: str, *after: str) -> list[str]:
    """Return the words of a command for this configuration, including all ``--set`` options."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        called = ["python", "-m", "stratagem"]
    else:
        called = (
            [relative_path(program)] if program.name == "stratagem" and program.parent.name == "bin" else ["stratagem"]
        )
    overrides = (word for override in options.overrides for word in ("--set", override))
    return [*called, command, str(options.config), *after, *overrides]
