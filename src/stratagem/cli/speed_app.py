"""Declare the commands that measure a model or its training: ``stratagem summary`` and ``stratagem profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.arguments import ConfigFile, Overrides
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions

__all__ = ["profile", "summary"]


def summary(
    config: ConfigFile,
    overrides: Overrides = None,
    depth: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Omit modules that are nested more deeply.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="TENSORS",
            help="The batch instead of the first one of the data, as in tokens=int64[8,1024].",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show the modules of the model of CONFIG.

    Lists shapes, parameters, floating-point operations and the memory of activations. No memory is allocated for the model,
    unless it depends on values.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    lazy_command("stratagem.cli.summary:summary")(options, batch=batch, depth=depth, as_json=as_json)


def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="The number of optimizer steps to record.")] = 10,
    skip: Annotated[
        int, typer.Option(metavar="K", min=0, help="The number of optimizer steps before the profiler starts.")
    ] = 5,
    with_stack: Annotated[
        bool, typer.Option("--with-stack", help="Record the lines that call operators in the trace.")
    ] = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder for the trace and the log. Default: work_dirs/<CONFIG>_profile."),
    ] = None,
    nproc: Annotated[int | None, typer.Option(metavar="N", min=1, help="Start N processes on this machine.")] = None,
    launcher: Annotated[
        str | None, typer.Option(metavar="NAME", help="The launcher of this process. Default: inferred.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The strategy: single, ddp, fsdp, deepspeed, colossalai, or a class name."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with times in seconds per iteration.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show where the time of training CONFIG goes, and what to do about it.

    Trains a few steps without evaluations and checkpoints. Writes a trace for Perfetto for each rank.
    """
    options = RunOptions(
        config=config,
        overrides=tuple(overrides or ()),
        work_dir=work_dir,
        launcher=launcher,
        strategy=strategy,
        nproc=nproc,
    )
    settings = lazy_command("stratagem.cli.profile:ProfileSettings")(steps=steps, skip=skip, with_stack=with_stack)
    lazy_command("stratagem.cli.profile:profile")(options, settings, as_json=as_json)
