"""Declare the commands of ``stratagem runs`` and ``stratagem watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.output import AsJson

__all__ = ["runs_app", "watch"]

runs_app = typer.Typer(help="List and compare runs, and show how they resumed.", no_args_is_help=True)


@runs_app.command("ls")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of one run, or of several runs.")] = Path(
        "work_dirs"
    ),
    metrics: Annotated[
        bool, typer.Option("--metrics", help="List runs instead of sessions, with their progress, metrics and speed.")
    ] = False,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """List the sessions of the runs under FOLDER, oldest first.

    Prints the checkpoint that each session resumed from, and how it ended.
    """
    name = "stratagem.cli.runs.metrics:list_metrics" if metrics else "stratagem.cli.runs.sessions:list_sessions"
    lazy_command(name)(folder, as_json=as_json)


@runs_app.command()
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the folder of a session.")],
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Show all sessions that led to PATH.

    Prints the configuration changes between them.
    """
    lazy_command("stratagem.cli.runs.sessions:show_sessions")(path, as_json=as_json)


@runs_app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Work directories, or the folders of sessions; two or more.")
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", metavar="NAME", help="A value to plot, such as val/accuracy. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also save the plot to FILE.")] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Compare runs: their metrics, speed, goodput and configurations, and a plot of their curves.

    `stratagem report RUN...` writes a page with all curves.
    """
    lazy_command("stratagem.cli.runs.compare:compare")(runs, metrics=tuple(metrics or ()), out=out, as_json=as_json)


def watch(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A work directory, or a folder of work directories.")
    ] = Path("work_dirs"),
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each record as a line of JSON, or the state with --once.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Follow a run from another terminal until its session ends.

    Shows the progress and the last values. If RUN contains several work directories, follows the newest one. In a pipe or a
    file, prints one line for each log line of the run. Reads files only, so it cannot disturb the training.
    """
    lazy_command("stratagem.cli.runs.watch:watch")(run, once=once, as_json=as_json)
