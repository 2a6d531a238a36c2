"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.completion import complete_config, complete_launcher, complete_strategy

__all__ = ["ConfigFile", "Launcher", "Nproc", "Out", "Overrides", "Strategy", "WorkDir"]

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="The configuration file: .py, .yaml, .json or .toml.",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, as in --set optim_wrapper.optimizer.lr=0.01."),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The folder of the run. Default: work_dir of CONFIG, or work_dirs/<name of CONFIG>."
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Start N processes on this machine, or on a Ray cluster with --launcher ray."
    ),
]
Launcher = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_launcher,
        help="The launcher of this process: none, pytorch, slurm or mpi. Default: inferred from the environment. With "
        "--nproc, ray starts the processes on a Ray cluster.",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_strategy,
        help="The strategy: single, ddp, fsdp, deepspeed, colossalai, or a class name.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Also save the chart to this file. Requires stratagem[plot].")
]
