"""Implement ``stratagem ckpt convert`` and ``stratagem ckpt consolidate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.filesize import decimal
from torch import Tensor

from stratagem.checkpoint import AVERAGE_PART, StateTree, flatten_tree, get_model_state
from stratagem.checkpoint.convert.convert import convert_checkpoint, open_checkpoint, write_weights
from stratagem.errors import CheckpointError
from stratagem.logging.console import shared_console
from stratagem.storage import tree_bytes
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["consolidate", "convert"]


def convert(source: str, target: Path, form: str | None) -> None:
    """Convert ``source`` to another format, and print which parts that format cannot store."""
    with shared_console().status(f"Converting {mask_text(source)} ..."):
        left_out = convert_checkpoint(source if is_url(source) else Path(source), target, form)
    typer.echo(f"Wrote {target} ({decimal(tree_bytes(target))}).")
    if left_out:
        typer.echo(f"This format stores only weights; left out: {', '.join(left_out)}.")


def consolidate(source: str, target: Path, *, averaged: bool) -> None:
    """Write the weights of ``source`` into a single safetensors file.

    Raises:
        CheckpointError: if ``target`` exists or has another suffix, or if averaged weights are requested but missing.
    """
    if target.suffix != ".safetensors":
        raise CheckpointError(f"The target is a safetensors file, but {target} does not end in .safetensors.")
    if target.exists():
        raise CheckpointError(f"{target} already exists. Choose another target, or remove it first.")
    with (
        shared_console().status(f"Reading {mask_text(source)} ..."),
        open_checkpoint(source if is_url(source) else Path(source)) as tree,
    ):
        weights = _weights(tree, source, averaged=averaged)
        write_weights(weights, absolute(target), folder=False)
    typer.echo(f"Wrote {len(weights)} tensors to {target} ({decimal(tree_bytes(target))}).")


def _weights(tree: StateTree, source: str, *, averaged: bool) -> dict[str, Tensor]:
    weights, _ = flatten_tree(get_model_state(tree, source), where="state_dict")
    if not averaged:
        return weights
    average = tree.get(AVERAGE_PART)
    averages = average.get("averages") if isinstance(average, Mapping) else None
    if not averages:
        raise CheckpointError(
            f"{mask_text(source)} has no averaged weights ({AVERAGE_PART}): the run had no EMAHook, or averaging had not "
            "started."
        )
    return {**weights, **averages}
