"""Declare the commands that measure a model: ``stratagem summary``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.completion import complete_config
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions

__all__ = ["summary"]

_ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="The configuration file: .py, .yaml, .json or .toml.",
        autocompletion=complete_config,
    ),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, as in --set optim_wrapper.optimizer.lr=0.01."),
]


def summary(
    config: _ConfigFile,
    overrides: _Overrides = None,
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
