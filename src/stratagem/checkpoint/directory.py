"""A checkpoint as a directory of safetensors files and JSON. No pickle is written or read.

``model.safetensors`` holds the model's state under the model's own names, as other tools expect; every other part that
has tensors has a file of its own; ``state.json`` holds all the rest, ``manifest.json`` the form's version and the size
of every file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_directory

__all__ = ["MANIFEST", "DirectoryFormat", "read_manifest"]

MANIFEST = "manifest.json"
_STATE = "state.json"
_FORMAT = "stratagem-checkpoint"
_VERSION = 1
_FILE_OF = {"state_dict": "model"}


@final
class DirectoryFormat:
    """Write and read a checkpoint directory."""

    def save(self, tree: StateTree, path: Path) -> None:
        """Write ``tree`` aside and publish it under ``path`` by one rename.

        Raises:
            CheckpointError: if a value cannot be stored, or the file system refuses; what was at ``path`` stays.
        """
        parts = {name: split_tree(part) for name, part in tree.items()}
        try:
            with atomic_directory(path) as aside:
                sizes: dict[str, int] = {}
                for name, (tensors, _) in parts.items():
                    if tensors:
                        sizes |= _write_tensors(aside / f"{_FILE_OF.get(name, name)}.safetensors", tensors)
                skeletons = {name: skeleton for name, (_, skeleton) in parts.items()}
                sizes |= _write_json(aside / _STATE, skeletons)
                # Last: a directory without it is no checkpoint.
                _write_json(aside / MANIFEST, _manifest(tree, sizes))
        except OSError as error:
            raise CheckpointError(
                f"{path}: the checkpoint could not be written: {error}. Nothing there was changed."
            ) from error

    def load(
        self, path: Path, *, map_location: torch.device | str = "cpu", parts: Collection[str] | None = None
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts.

        Raises:
            CheckpointNotFoundError: if there is no such directory.
            CheckpointError: if it is not one of ours.
            CheckpointDamagedError: if a file is missing, shorter or longer than when it was written, or unreadable.
        """
        manifest = read_manifest(path)
        for name, size in manifest["files"].items():
            _check_size(path / name, size)
        skeletons = _read_json(path / _STATE)
        tree = {}
        for name, skeleton in skeletons.items():
            if parts is not None and name not in parts:
                continue
            file = path / f"{_FILE_OF.get(name, name)}.safetensors"
            tensors = _read_tensors(file, map_location) if file.name in manifest["files"] else {}
            try:
                tree[name] = join_tree(tensors, skeleton)
            except CheckpointDamagedError as error:
                raise CheckpointDamagedError(f"{file}: {error}") from error
        return tree


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory: what it is, its files and where its run stood.

    Raises:
        CheckpointNotFoundError: if there is no such directory.
        CheckpointError: if it is not a checkpoint of ours, or of a later version.
        CheckpointDamagedError: if the manifest cannot be read.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint of Stratagem: it has no {MANIFEST}. A checkpoint is a directory such as "
            "work_dirs/<name>/epoch_3, or a single .pth file."
        )
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path / MANIFEST} belongs to another program; this is not a checkpoint of Stratagem.")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: the checkpoint has version {manifest.get('version')} of the format, this Stratagem reads version "
            f"{_VERSION}. Read it with the version that wrote it ({manifest.get('stratagem')})."
        )
    return manifest


def _manifest(tree: StateTree, sizes: dict[str, int]) -> dict[str, Any]:
    meta = tree.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    position = {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "stratagem": meta.get("stratagem"),
        "saved_at": time.time(),
        "position": position,
        "files": sizes,
    }


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write tensors and return the file's size by its name.

    safetensors takes contiguous tensors that share no memory: a tied weight is written under each of its names.
    """
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # Scalars of an optimizer live on the device of their parameter, or on the CPU.
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage().data_ptr()
        if copy.numel() and (storage in seen or copy.untyped_storage().nbytes() != copy.nbytes):
            copy = copy.clone()
            storage = copy.untyped_storage().data_ptr()
        seen.add(storage)
        separate[name] = copy
    save_file(separate, file)
    return {file.name: file.stat().st_size}


def _read_tensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error


def _write_json(file: Path, content: Any) -> dict[str, int]:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return {file.name: file.write_bytes(text.encode())}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointDamagedError(f"{file} has {actual} bytes, but {size} were written: it was cut off or changed.")
