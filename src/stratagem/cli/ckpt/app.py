"""Declare the commands of ``stratagem ckpt``. Only ``convert --config`` needs the model's code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.arguments import Overrides
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.output import AsJson

__all__ = ["ckpt_app"]

ckpt_app = typer.Typer(help="Inspect, convert and prune checkpoints without model code.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A Stratagem checkpoint, a .pth or .safetensors file, a Hugging Face or torch DCP folder, or a URL.",
    ),
]


@ckpt_app.command("ls")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of one run, or of several runs.")] = Path(
        "work_dirs"
    ),
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """List the checkpoints under FOLDER, newest first.

    Prints the epoch, iteration, size and state of each. Reads only the manifests; `verify` reads all files.
    """
    lazy_command("stratagem.cli.ckpt.listing:list_checkpoints")(folder, as_json=as_json)


@ckpt_app.command()
def show(
    checkpoint: Source,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its dtype, shape and range of values.")
    ] = False,
    config: Annotated[bool, typer.Option("--config", help="Print the configuration of the training run.")] = False,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Show the parts of CKPT, their sizes, and its metadata."""
    lazy_command("stratagem.cli.ckpt.show:show")(checkpoint, tensors=tensors, config=config, as_json=as_json)


@ckpt_app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="CKPT...", help="Checkpoints, or folders of checkpoints.")],
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Verify the digests of all files in the given checkpoints.

    Exits with status 1 if a checkpoint is damaged.
    """
    lazy_command("stratagem.cli.ckpt.listing:verify")(paths, as_json=as_json)


@ckpt_app.command()
def diff(
    first: Source,
    second: Source,
    part: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Compare only this part, such as state_dict. Repeatable.")
    ] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Print the differences between two checkpoints.

    Exits with status 1 if a value or tensor differs.
    """
    lazy_command("stratagem.cli.ckpt.show:diff")(first, second, parts=tuple(part or ()), as_json=as_json)


@ckpt_app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The path to write. It must not exist.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="stratagem, pth, safetensors, huggingface, state_dict or dcp. Default: the format for the suffix of "
            "TARGET (.pth or .safetensors), or stratagem if TARGET has no suffix.",
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Write the trained weights instead of the averaged weights."),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help="With huggingface: the configuration of the run. Its model is built, and TARGET becomes a complete folder that "
            "from_pretrained opens.",
        ),
    ] = None,
    overrides: Overrides = None,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With huggingface and state_dict: the module to write, such as network. A dot is the whole model.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="With huggingface: the tokenizer whose files are added.")
    ] = None,
    merge_adapters: Annotated[
        bool,
        typer.Option(
            "--merge-adapters",
            help="With huggingface: add PEFT adapters to the weights instead of writing only the adapter.",
        ),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Convert CKPT to another format, one tensor at a time.

    If the run averaged its weights (EMAHook), the safetensors, huggingface and state_dict formats contain the averaged weights.
    The other formats contain both. With --config and with state_dict, all weights are in memory at once.
    """
    folder = lazy_command("stratagem.cli.ckpt.hugging_face:FolderOptions")(
        config=config,
        overrides=tuple(overrides or ()),
        module=module,
        tokenizer=tokenizer,
        merge_adapters=merge_adapters,
    )
    lazy_command("stratagem.cli.ckpt.convert:convert")(source, target, form, raw=raw, folder=folder)


@ckpt_app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run.")],
    keep_last: Annotated[int, typer.Option(metavar="K", min=1, help="Keep the last K checkpoints of each run.")],
    keep_best: Annotated[int, typer.Option(metavar="K", min=1, help="Keep the K best checkpoints of each metric.")] = 1,
    keep_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Keep checkpoints whose epoch or iteration is a multiple of N."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    traceback: Traceback = False,
) -> None:
    """Remove old checkpoints of the runs in FOLDER.

    Applies the retention rules of CheckpointHook. The latest checkpoints are verified first: damaged checkpoints do not count
    as kept. Checkpoints that were saved manually are never removed.
    """
    lazy_command("stratagem.cli.ckpt.prune:prune")(
        folder, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, ask=not yes, dry_run=dry_run
    )


@ckpt_app.command()
def consolidate(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="TARGET.safetensors", help="The file to write.")],
    averaged: Annotated[
        bool,
        typer.Option(
            "--averaged", help="Fail if CKPT has no averaged weights (EMA). If it has, they are written by default."
        ),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Write the trained weights instead of the averaged weights."),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Write the weights of CKPT into one safetensors file."""
    lazy_command("stratagem.cli.ckpt.convert:consolidate")(source, target, averaged=averaged, raw=raw)
