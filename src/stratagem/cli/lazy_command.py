"""Import the implementation of a command only when it runs, and define the ``--traceback`` option of all commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stratagem.utils import import_object

__all__ = ["Traceback", "lazy_command"]

Traceback = Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")]


def lazy_command(target: str) -> Any:
    """Import and return the implementation of a command, given as ``module:name``.

    Commands call this when they run, so that ``--help`` does not import torch.
    """
    return import_object(target)
