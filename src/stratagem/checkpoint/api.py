"""Save and load a checkpoint without a strategy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratagem.checkpoint.directory.directory import DirectoryFormat
from stratagem.checkpoint.directory.write_plan import spec_of
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.formats.choice import format_for
from stratagem.checkpoint.frozen_weights import omitted_digests, require_omitted_weights
from stratagem.checkpoint.remote.checkpoint_urls import save_remote
from stratagem.checkpoint.remote.sources import CheckpointLoader
from stratagem.checkpoint.tree.flatten import StateTree, flatten_state
from stratagem.checkpoint.tree.load import DEFAULT_REVISE_KEYS, LoadReport, load_state_dict
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointError
from stratagem.model import unwrap_model
from stratagem.storage import is_remote_scheme
from stratagem.utils import absolute, is_url, mask_text
from stratagem.utils.paths import path_fault

__all__ = ["check_storable", "load_checkpoint", "get_model_state", "check_writable", "save_checkpoint", "write_to"]


def save_checkpoint(
    checkpoint: Mapping[str, Any], filename: str | os.PathLike[str], rank_group: RankGroup = SINGLE_PROCESS
) -> None:
    """Save a state tree atomically: ``filename`` contains either the complete tree or its previous contents.

    A name that ends in ``.pth`` (or ``.pt``, ``.ckpt``, ``.bin``) is written as a single file in torch's format, any other
    name as a directory of safetensors and JSON files. For a URL that fsspec can open (``s3://bucket/run/epoch_3``), the
    checkpoint is first written locally and then uploaded. Collective over ``rank_group``; by default only this process writes,
    even in a distributed run.

    Raises:
        CheckpointError: if a value cannot be stored without pickle, or the file system reports an error.
    """
    tree = dict(checkpoint)
    write_to(filename, lambda path: format_for(path).save(tree, path, rank_group), rank_group)


def write_to(
    filename: str | os.PathLike[str], write: Callable[[Path], None], rank_group: RankGroup = SINGLE_PROCESS
) -> None:
    """Create the parent folder and call ``write`` with the path; for a URL, write locally and upload. Collective.

    Raises:
        CheckpointError: if the checkpoint cannot be written to ``filename``.
    """
    check_writable(filename)
    if is_url(filename):
        save_remote(os.fspath(filename), write, rank_group)
        return
    path = absolute(filename)
    rank_group.run_on_rank0(lambda: _make_parents(path))
    write(path)


def check_writable(filename: str | os.PathLike[str]) -> None:
    """Check that ``filename`` is a path or a URL that fsspec can write to.

    Raises:
        CheckpointError: if the URL is read-only or its scheme is unknown.
    """
    url = os.fspath(filename)
    fault = path_fault(url if is_url(filename) else absolute(filename))
    if fault is not None:
        raise CheckpointError(f"{fault}, so a checkpoint saved there could not be loaded. Choose a different name.")
    if is_url(filename) and (CheckpointLoader.is_read_only(url) or not is_remote_scheme(url.partition("://")[0])):
        raise CheckpointError(
            f"{mask_text(url)}: cannot save checkpoints to this URL. Use a local path or a URL that fsspec can write "
            "to."
        )


def check_storable(tensors: Mapping[str, Any], filename: str | os.PathLike[str]) -> None:
    """Check that the format selected by ``filename`` can store all tensors. Writes nothing.

    Raises:
        CheckpointError: if the format cannot store a tensor; the message names the first such tensor.
    """
    flat, _ = flatten_state({"state_dict": dict(tensors)})
    if isinstance(format_for(Path(filename)), DirectoryFormat):
        for name, tensor in flat.items():
            spec_of(tensor, name)


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
    """Load the model weights of a checkpoint into ``model``; return the whole checkpoint and a report on matching its keys.

    Raises:
        CheckpointError: (or a subclass) if the checkpoint is missing or damaged, or does not match the model.
    """
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
    state = get_model_state(checkpoint, filename)
    require_omitted_weights(unwrap_model(model), checkpoint, filename)
    allowed = [re.escape(name) for name in omitted_digests(checkpoint)]
    return checkpoint, load_state_dict(
        unwrap_model(model), state, strict=strict, revise_keys=revise_keys, allow_missing=allowed
    )


def get_model_state(checkpoint: Mapping[str, Any], filename: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the model state of a checkpoint.

    Raises:
        CheckpointError: if the checkpoint has no model state.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        parts = ", ".join(map(repr, checkpoint)) or "nothing"
        raise CheckpointError(
            f"{mask_text(os.fspath(filename))} has no model state ('state_dict'); it contains {parts}."
        )
    return state
