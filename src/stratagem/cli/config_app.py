"""Declare the commands of ``stratagem config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.arguments import ConfigFile, Overrides
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions
from stratagem.cli.output import AsJson

__all__ = ["config_app"]

config_app = typer.Typer(help="Print, compare and check configurations without training.", no_args_is_help=True)


@config_app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--as", metavar="FORM", help="python, yaml, json or toml.")] = "python",
    traceback: Traceback = False,
) -> None:
    """Print CONFIG after merging its bases and overrides."""
    lazy_command("stratagem.cli.configs:show")(RunOptions(config=config, overrides=tuple(overrides or ())), form)


@config_app.command()
def explain(
    config: ConfigFile,
    path: Annotated[str, typer.Argument(metavar="A.B.C", help="The dotted path of a value.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Print each file and line that set a value of CONFIG, in order."""
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    lazy_command("stratagem.cli.configs:explain")(options, path, as_json=as_json)


@config_app.command()
def diff(
    first: Annotated[
        Path,
        typer.Argument(metavar="A", help="A configuration file, or a checkpoint, which contains its configuration."),
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="The configuration file or checkpoint to compare it with.")
    ],
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Print the differences between two merged configurations."""
    lazy_command("stratagem.cli.configs:diff")(first, second, as_json=as_json)


@config_app.command()
def port(
    config: ConfigFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Write the result to a file, or with its bases into a folder, instead of printing it.",
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Rewrite CONFIG, a Python file that MMEngine's Runner reads, for this package. Comments stay.

    If CONFIG has bases, --out is a folder, which receives all files in the same structure.
    """
    lazy_command("stratagem.cli.configs:port")(config, out)


@config_app.command()
def check(
    config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False, traceback: Traceback = False
) -> None:
    """Check all keys and arguments of CONFIG without training."""
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    lazy_command("stratagem.cli.configs:check")(options, as_json=as_json)
