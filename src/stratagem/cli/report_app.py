"""Declare the command ``stratagem report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.lazy_command import Traceback, lazy_command

__all__ = ["report"]


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Work directories, or the folders of sessions. Several are compared."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.html", help="The file to write.", show_default=True)
    ] = Path("report.html"),
    traceback: Traceback = False,
) -> None:
    """Write a report of RUN, or a comparison of several runs, as one HTML file.

    Contains curves, goodput, sessions, checkpoints, warnings, the configuration and the environment. The file needs no
    network. Works for runs that were killed, have failed or are still running.
    """
    lazy_command("stratagem.cli.report:report")(runs, out=out)
