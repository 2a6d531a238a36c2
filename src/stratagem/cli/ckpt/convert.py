"""Implement ``stratagem ckpt convert`` and ``stratagem ckpt consolidate``."""

from __future__ import annotations

from pathlib import Path

from rich.filesize import decimal

from stratagem.checkpoint import AVERAGE_PART, evaluated_weights, has_averaged_weights, omitted_digests
from stratagem.checkpoint.convert.convert import convert_checkpoint, open_checkpoint, weights_of, write_weights
from stratagem.checkpoint.convert.plain import export_state_dict
from stratagem.cli.ckpt.hugging_face import FolderOptions, write_folder
from stratagem.cli.output import echo, status
from stratagem.errors import CheckpointError
from stratagem.storage import tree_bytes
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["consolidate", "convert"]

_AVERAGED = "Wrote the averaged weights, which the run used for evaluation. Use --raw to write the trained weights."
_WEIGHTS_ONLY = FolderOptions()


def convert(source: str, target: Path, form: str | None, *, raw: bool, folder: FolderOptions = _WEIGHTS_ONLY) -> None:
    """Convert ``source`` to another format, and print which parts that format cannot store.

    Raises:
        CheckpointError: or a subclass, if an option does not apply to the format, or the conversion fails.
    """
    if folder.given and (form != "huggingface" or folder.config is None):
        raise CheckpointError(
            f"{' and '.join(folder.given)}: only --to huggingface with --config CONFIG uses these options. Add both, or omit the "
            "options."
        )
    if folder.module is not None and form != "state_dict" and folder.config is None:
        raise CheckpointError(
            f"--module {folder.module}: only --to state_dict, and --to huggingface with --config CONFIG, use a module. Omit it."
        )
    if folder.config is not None:
        write_folder(source, target, folder.config, folder, raw=raw)
        return
    if form == "state_dict":
        _write_state_dict(source, target, module=folder.module, raw=raw)
        return
    where = source if is_url(source) else Path(source)
    with status(f"Converting {mask_text(source)} ..."):
        left_out = convert_checkpoint(where, target, form, raw=raw)
        with open_checkpoint(where) as tree:
            omitted = omitted_digests(tree)
    echo(f"Wrote {target} ({decimal(tree_bytes(target))}).")
    if AVERAGE_PART in left_out and not raw:
        echo(_AVERAGED)
    if left_out:
        echo(f"This format stores only weights; left out: {', '.join(left_out)}.")
    if form == "huggingface":
        echo(
            "The folder has no config.json, which from_pretrained requires. Add --config CONFIG to build the model and write it."
        )
    _report_omitted(len(omitted))


def _write_state_dict(source: str, target: Path, *, module: str | None, raw: bool) -> None:
    with status(f"Converting {mask_text(source)} ..."):
        written = export_state_dict(source if is_url(source) else Path(source), target, module=module, raw=raw)
    of = "the whole model" if written.module == "." else f"the module {written.module!r}"
    echo(f"Wrote {written.keys} weights of {of} to {target} ({decimal(tree_bytes(target))}).")
    if written.averaged:
        echo(_AVERAGED)
    if written.left_out:
        echo(f"Left out, because it belongs to other modules: {', '.join(written.left_out)}.")
    _report_omitted(written.omitted)


def consolidate(source: str, target: Path, *, averaged: bool, raw: bool) -> None:
    """Write the weights of ``source`` into a single safetensors file.

    Raises:
        CheckpointError: if ``target`` exists or has another suffix, or if averaged weights are requested but missing.
    """
    if averaged and raw:
        raise CheckpointError("--averaged and --raw are mutually exclusive. Omit one of them.")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"The target is a safetensors file, but {target} does not end in .safetensors.")
    if target.exists():
        raise CheckpointError(f"{target} already exists. Choose another target, or remove it first.")
    with (
        status(f"Reading {mask_text(source)} ..."),
        open_checkpoint(source if is_url(source) else Path(source)) as tree,
    ):
        weights = weights_of(tree, source)
        has_averages = has_averaged_weights(tree)
        if averaged and not has_averages:
            raise CheckpointError(
                f"{mask_text(source)} has no averaged weights ({AVERAGE_PART}): the run had no EMAHook, or averaging had not "
                "started."
            )
        weights = weights if raw else evaluated_weights(tree, weights)
        write_weights(weights, absolute(target), folder=False)
        omitted = omitted_digests(tree)
    if has_averages and not raw:
        echo(_AVERAGED)
    echo(f"Wrote {len(weights)} tensors to {target} ({decimal(tree_bytes(target))}).")
    _report_omitted(len(omitted))


def _report_omitted(omitted: int) -> None:
    if omitted:
        echo(
            f"The checkpoint omits {omitted} frozen parameters (save_frozen=False), so the file contains only the others: "
            "load it into a model that has the frozen weights."
        )
