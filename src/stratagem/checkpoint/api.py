"""Save and load a checkpoint without a strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.formats.choice import format_for
from stratagem.checkpoint.remote.checkpoint_urls import save_remote
from stratagem.checkpoint.remote.sources import CheckpointLoader
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.checkpoint.tree.load import DEFAULT_REVISE_KEYS, LoadReport, load_state_dict
from stratagem.distributed import ALONE, Team
from stratagem.errors import CheckpointError
from stratagem.model import unwrap_model
from stratagem.storage import is_remote_scheme
from stratagem.utils import absolute, is_url, mask_text

__all__ = ["load_checkpoint", "get_model_state", "check_writable", "save_checkpoint", "write_to"]


def save_checkpoint(checkpoint: Mapping[str, Any], filename: str | os.PathLike[str], team: Team = ALONE) -> None:
    """Write a tree of state so that ``filename`` holds either all of it or what it held before.

    A name that ends in ``.pth`` gives one file of torch's form, any other a directory of safetensors and JSON. A URL that
    fsspec opens (``s3://bucket/run/epoch_3``) is made here first, and then published there whole. Collective over
    ``team``: by default this process writes alone, whatever others there are.

    Raises:
        CheckpointError: if a value cannot be stored without pickle, or the file system refuses.
    """
    tree = dict(checkpoint)
    write_to(filename, lambda path: format_for(path).save(tree, path, team), team)


def write_to(filename: str | os.PathLike[str], write: Callable[[Path], None], team: Team = ALONE) -> None:
    """Have ``write`` publish a checkpoint at a path, in a folder that is made, and from there at a URL. Collective.

    Raises:
        CheckpointError: if nothing can be written there.
    """
    check_writable(filename)
    if is_url(filename):
        save_remote(os.fspath(filename), write, team)
        return
    path = absolute(filename)
    team.first(lambda: _make_parents(path))
    write(path)


def check_writable(filename: str | os.PathLike[str]) -> None:
    """Refuse a URL that can only be read from.

    Raises:
        CheckpointError: if it is one.
    """
    url = os.fspath(filename)
    if is_url(filename) and (CheckpointLoader.only_reads(url) or not is_remote_scheme(url.partition("://")[0])):
        raise CheckpointError(
            f"{mask_text(url)}: checkpoints are written to paths, and to places that fsspec opens and writes to."
        )


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise save_error(path, error) from error


def load_checkpoint(
    model: nn.Module,
    filename: str | os.PathLike[str],
    map_location: torch.device | str = "cpu",
    *,
    strict: bool = False,
    revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
) -> tuple[StateTree, LoadReport]:
    """Load a checkpoint's weights into ``model``; return the whole checkpoint and how the two fit together.

    Raises:
        CheckpointError: in one of its kinds, if there is none, it is damaged, or it belongs to another model.
    """
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
    state = get_model_state(checkpoint, filename)
    return checkpoint, load_state_dict(unwrap_model(model), state, strict=strict, revise_keys=revise_keys)


def get_model_state(checkpoint: Mapping[str, Any], filename: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the model's state of a checkpoint.

    Raises:
        CheckpointError: if it has none.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        parts = ", ".join(map(repr, checkpoint)) or "nothing"
        raise CheckpointError(f"{mask_text(os.fspath(filename))} has no model state ('state_dict'); it has {parts}.")
    return state
