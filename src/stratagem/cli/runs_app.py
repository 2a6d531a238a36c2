"""``stratagem runs``: which start of a run went on from which."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.lazy_command import Traceback, lazy_command

__all__ = ["runs_app"]

runs_app = typer.Typer(help="See which start of a run went on from which, and what was changed.", no_args_is_help=True)


@runs_app.command("ls")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run, or of several.")] = Path(
        "work_dirs"
    ),
    traceback: Traceback = False,
) -> None:
    """List the starts of the runs under FOLDER, the oldest first: from where each went on, and how it ended."""
    lazy_command("stratagem.cli.runs:list_starts")(folder)


@runs_app.command()
def show(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A checkpoint, or the folder of a start.")],
    traceback: Traceback = False,
) -> None:
    """Show all starts that led to PLACE, with the changes of the configuration between them."""
    lazy_command("stratagem.cli.runs:show_lineage")(place)
