"""Declare ``stratagem export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem.cli.arguments import ConfigFile, Overrides
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions

__all__ = ["export"]


def export(
    config: ConfigFile,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint, a path or a URL.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write: .pt2 or .onnx. It must not exist."),
    ],
    form: Annotated[
        str, typer.Option("--to", metavar="FORM", help="torch-export, or onnx, which requires stratagem[onnx].")
    ] = "torch-export",
    module: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The module to export, such as network.encoder. A dot is the whole model. Default: network, if the model is a "
            "SupervisedModel or ModelWithLoss, or else the whole model.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="TENSORS",
            help="The inputs of the module, as in float32[8,3,32,32] or input_ids=int64[8,128]. Default: those of the first "
            "batch of the prediction, test, validation or training data.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="The largest permitted difference, relative to the largest value of an output. Default: by dtype.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Export the trained weights instead of the averaged weights.")
    ] = False,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    traceback: Traceback = False,
) -> None:
    """Export the model of CHECKPOINT for inference without Stratagem, with torch.export or as ONNX.

    The first dimension of the inputs may have any size. The file is loaded and compared with the model for two sizes.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    settings = lazy_command("stratagem.cli.export:ExportSettings")(
        form=form, out=out, module=module, inputs=inputs, tolerance=tolerance, raw=raw
    )
    lazy_command("stratagem.cli.export:export")(options, checkpoint, settings, as_json=as_json)
