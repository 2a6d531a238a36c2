"""The option and the import that all groups of commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stratagem.utils import import_object

__all__ = ["Traceback", "lazy_command"]

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def lazy_command(target: str) -> Any:
    """Import and return the implementation of a command, given as ``module:name``.

    Called inside the command, so that ``--help`` and ``config show`` do not wait for torch.
    """
    return import_object(target)
