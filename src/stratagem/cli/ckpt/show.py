"""Implement ``stratagem ckpt show`` and ``stratagem ckpt diff``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.filesize import decimal
from torch import Tensor

from stratagem.checkpoint import OMITTED, StateTree, flatten_tree, omitted_digests
from stratagem.checkpoint.convert.compare import CheckpointDifference, compare
from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.cli.output import Table, echo, print_json, print_table, rows_of
from stratagem.errors import CheckpointError
from stratagem.utils import did_you_mean, is_url, mask_text

__all__ = ["diff", "show"]

# Metadata that only --config prints, because it is long.
_LONG = {"cfg", "config"}
# The number of elements that are converted to float64 at a time.
_CHUNK = 1 << 22


def show(checkpoint: str, *, tensors: bool, config: bool, as_json: bool = False) -> None:
    """Print the contents of a checkpoint, or only the configuration in it.

    Args:
        checkpoint: the path or URL of the checkpoint.
        tensors: whether to list every tensor.
        config: whether to print only the configuration.
        as_json: whether to print an object with ``meta``, ``parts`` and, if requested, ``tensors``.

    Raises:
        CheckpointError: if the configuration is requested and the checkpoint has none.
    """
    with open_checkpoint(_path_or_url(checkpoint)) as tree:
        meta = tree.get("meta")
        meta = meta if isinstance(meta, Mapping) else {}
        if config:
            if not meta.get("cfg"):
                raise CheckpointError(f"{mask_text(checkpoint)} contains no configuration (meta has no 'cfg').")
            # Checkpoints of earlier versions may contain secrets.
            echo(mask_text(str(meta["cfg"])))
            return
        facts = _facts(meta)
        tables = {"parts": _parts(tree), **({"tensors": _tensors(tree)} if tensors else {})}
    if as_json:
        print_json({"meta": facts, **{name: rows_of(table) for name, table in tables.items()}})
        return
    header = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        header.add_row(key, value)
    for table in (header, *tables.values()):
        print_table(table)


def diff(first: str, second: str, *, parts: Sequence[str], as_json: bool = False) -> None:
    """Print the differences between two checkpoints.

    Args:
        first: the path or URL of the first checkpoint.
        second: the path or URL of the second checkpoint.
        parts: the parts to compare; all if empty.
        as_json: whether to print a JSON list of the differences.

    Raises:
        CheckpointError: if neither checkpoint has one of ``parts``.
        typer.Exit: with status 1, if they differ.
    """
    with open_checkpoint(_path_or_url(first)) as one, open_checkpoint(_path_or_url(second)) as other:
        for name in parts:
            if name not in one and name not in other:
                raise CheckpointError(f"Neither checkpoint has a part {name!r}. {did_you_mean(name, [*one, *other])}")
        chosen = [{name: part for name, part in tree.items() if not parts or name in parts} for tree in (one, other)]
        differences = list(compare(*chosen))
    if not differences and not as_json:
        echo("No differences.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("where", "first", "second", "difference"):
        table.add_column(heading, overflow="fold")
    for difference in differences:
        table.add_row(
            difference.key, _short(difference.first), _short(difference.second), _describe_difference(difference)
        )
    print_table(table, as_json=as_json)
    if not as_json:
        echo(f"{len(differences)} differences." if len(differences) > 1 else "1 difference.")
    if differences:
        raise typer.Exit(1)


def _path_or_url(checkpoint: str) -> str | Path:
    return checkpoint if is_url(checkpoint) else Path(checkpoint)


def _describe_difference(difference: CheckpointDifference) -> str:
    if difference.max_abs_diff is None:
        return "only in the second" if not difference.first else "only in the first" if not difference.second else ""
    return f"up to {difference.max_abs_diff:.3g} in {difference.differing_fraction:.1%} of the elements"


def _facts(meta: Mapping[str, Any]) -> dict[str, str]:
    omitted = omitted_digests({"meta": meta})
    facts = {OMITTED: f"{len(omitted)} frozen parameters (save_frozen=False)"} if omitted else {}
    return {
        str(key): _short(mask_text(repr(value) if not isinstance(value, str) else value))
        for key, value in meta.items()
        if key not in _LONG and key != OMITTED
    } | facts


def _parts(tree: StateTree) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("part", "tensors", "elements", "size"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, part in tree.items():
        tensors = flatten_tree(part, where=name)[0].values()
        size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
        table.add_row(name, str(len(tensors)), f"{sum(t.numel() for t in tensors):,}", decimal(size))
    return table


def _tensors(tree: StateTree) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tensor", "dtype", "shape", "min", "max", "NaN or Inf"):
        table.add_column(heading, overflow="fold")
    for name, part in tree.items():
        for key, tensor in flatten_tree(part, where=name)[0].items():
            kind = str(tensor.dtype).removeprefix("torch.")
            table.add_row(f"{name}/{key}", kind, str(list(tensor.shape)), *_range(tensor))
    return table


def _range(tensor: Tensor) -> tuple[str, str, str]:
    """Return the smallest and largest finite value and the number of NaN or Inf values, as strings."""
    if tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        return "", "", ""
    low, high, nonfinite = float("inf"), float("-inf"), 0
    flat = tensor.reshape(-1)
    for begin in range(0, len(flat), _CHUNK):
        chunk = flat[begin : begin + _CHUNK].to(torch.float64)
        finite = chunk[chunk.isfinite()]
        nonfinite += len(chunk) - len(finite)
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    shown = ("", "") if low > high else (f"{low:.6g}", f"{high:.6g}")
    return *shown, str(nonfinite) if nonfinite else ""


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
