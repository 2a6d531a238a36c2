"""Declare the command ``stratagem init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.completion import complete_kind
from stratagem.cli.lazy_command import Traceback, lazy_command

__all__ = ["init"]


def init(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="The kind of data: image, text or table.", autocompletion=complete_kind),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create; it must not contain files.")],
    traceback: Traceback = False,
) -> None:
    """Create a small project in FOLDER: a configuration, a model, a dataset and a test.

    The project trains within seconds on data that it generates. Prints the commands to try.
    """
    lazy_command("stratagem.cli.init.command:init")(kind, folder)
