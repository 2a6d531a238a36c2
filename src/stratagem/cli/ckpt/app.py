"""``stratagem ckpt``: look at checkpoints, check, compare and convert them. No model code is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.lazy_command import Traceback, lazy_command

__all__ = ["ckpt_app"]

ckpt_app = typer.Typer(
    help="Look at checkpoints, check, compare, convert and prune them; no model code is needed.", no_args_is_help=True
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A checkpoint: ours, a .pth, safetensors, a folder of Hugging Face or of torch's DCP, or a URL.",
    ),
]


@ckpt_app.command("ls")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run, or of several.")] = Path(
        "work_dirs"
    ),
    traceback: Traceback = False,
) -> None:
    """List the checkpoints under FOLDER, the newest first: where each stands, its size, and what is wrong with it.

    Only manifests are read; `verify` reads all.
    """
    lazy_command("stratagem.cli.ckpt.listing:list_checkpoints")(folder)


@ckpt_app.command()
def show(
    checkpoint: Source,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its type, shape and range of numbers.")
    ] = False,
    config: Annotated[bool, typer.Option("--config", help="Print the configuration that it was trained by.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show what CKPT holds: its parts with their sizes, where its run stood, and what it was made by."""
    lazy_command("stratagem.cli.ckpt.show:show")(checkpoint, tensors=tensors, config=config)


@ckpt_app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="Checkpoints, or folders whose checkpoints are all read.")
    ],
    traceback: Traceback = False,
) -> None:
    """Read every byte and compare it with its digest; exit with 1 if one is damaged."""
    lazy_command("stratagem.cli.ckpt.listing:verify")(paths)


@ckpt_app.command()
def diff(
    first: Source,
    second: Source,
    part: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Compare only this part, such as state_dict; repeatable.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Print each value and tensor that differs between two checkpoints, and by how much; exit with 1 if any does."""
    lazy_command("stratagem.cli.ckpt.show:diff")(first, second, parts=tuple(part or ()))


@ckpt_app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Where to write; it must not exist.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="stratagem, pth, safetensors, huggingface or dcp. By default what TARGET's ending says: .pth, "
            ".safetensors, or without one a directory of ours.",
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Turn CKPT into another form, a tensor at a time."""
    lazy_command("stratagem.cli.ckpt.convert:convert")(source, target, form)


@ckpt_app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run.")],
    keep_last: Annotated[int, typer.Option(metavar="K", min=1, help="Keep the last K of each run.")],
    keep_best: Annotated[int, typer.Option(metavar="K", min=1, help="Keep the K best by each metric.")] = 1,
    keep_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep those whose number is a multiple of N.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    traceback: Traceback = False,
) -> None:
    """Remove old checkpoints of the runs in FOLDER, as their hook would have.

    The last ones are read first: a damaged one does not count. What no run saved by itself stays.
    """
    lazy_command("stratagem.cli.ckpt.prune:prune")(
        folder, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, ask=not yes, dry_run=dry_run
    )


@ckpt_app.command()
def consolidate(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="TARGET.safetensors", help="The file to write.")],
    averaged: Annotated[
        bool, typer.Option("--averaged", help="Take the averaged weights where the run kept an average.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Put the weights of CKPT, however they are spread over files, into one file of safetensors, and nothing else."""
    lazy_command("stratagem.cli.ckpt.convert:consolidate")(source, target, averaged=averaged)
