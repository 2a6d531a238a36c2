"""Declare the commands of ``stratagem find``."""

from __future__ import annotations

from typing import Annotated

import typer

from stratagem.cli.arguments import ConfigFile, Launcher, Nproc, Out, Overrides, Strategy
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions
from stratagem.cli.output import AsJson

__all__ = ["find_app"]

find_app = typer.Typer(help="Find a learning rate or a batch size with short trial runs.", no_args_is_help=True)


@find_app.command()
def lr(
    config: ConfigFile,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--min", metavar="LR", help="The first learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option("--max", metavar="LR", help="The last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(metavar="N", help="The number of optimizer steps.")] = 100,
    loss: Annotated[str, typer.Option(metavar="NAME", help="The logged value to use as the loss.")] = "loss",
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The optimizer to find the learning rate for, if there are several, or the part of a MixedOptimizer.",
        ),
    ] = None,
    out: Out = None,
    nproc: Nproc = None,
    launcher: Launcher = None,
    strategy: Strategy = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Run a learning-rate range test of CONFIG.

    Trains with an increasing learning rate and plots the loss. Stops when the loss diverges, and suggests learning
    rates. Writes no files except FILE.
    """
    options = RunOptions(
        config=config, overrides=tuple(overrides or ()), launcher=launcher, strategy=strategy, nproc=nproc
    )
    sweep = lazy_command("stratagem.cli.find:Sweep")(low=low, high=high, steps=steps, loss=loss, optimizer=optimizer)
    lazy_command("stratagem.cli.find:learning_rate")(options, sweep, out=out, as_json=as_json)


@find_app.command()
def batch(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--max-batch", metavar="N", min=1, help="The largest batch size to try. Default on the CPU: 1024."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="The number of iterations per timing.")] = 3,
    out: Out = None,
    strategy: Strategy = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Find the largest batch size of CONFIG that fits into memory.

    Doubles the batch size until memory runs out, and plots the throughput of each size. On the CPU, running out of
    memory does not reliably raise an error, so only sizes up to --max-batch are measured. Writes no files except FILE.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()), strategy=strategy)
    lazy_command("stratagem.cli.find:batch_size")(options, limit=limit, steps=steps, out=out, as_json=as_json)
