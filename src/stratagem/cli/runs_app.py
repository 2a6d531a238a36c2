"""Declare the commands of ``stratagem runs``, which print the sessions of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.output import AsJson

__all__ = ["runs_app"]

runs_app = typer.Typer(help="Show the history of runs: when and how they resumed.", no_args_is_help=True)


@runs_app.command("ls")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of one run, or of several runs.")] = Path(
        "work_dirs"
    ),
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """List the sessions of the runs under FOLDER, oldest first.

    Prints the checkpoint that each session resumed from, and how it ended.
    """
    lazy_command("stratagem.cli.runs:list_sessions")(folder, as_json=as_json)


@runs_app.command()
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or the folder of a session.")],
    traceback: Traceback = False,
) -> None:
    """Show all sessions that led to PATH.

    Prints the configuration changes between them.
    """
    lazy_command("stratagem.cli.runs:show_sessions")(path)
