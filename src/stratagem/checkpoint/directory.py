"""A checkpoint as a directory of safetensors files and JSON. No pickle is written or read.

``model.safetensors`` holds the model's state under the model's own names, as other tools expect; every other part that
has tensors has a file of its own; ``state.json`` holds all the rest, ``manifest.json`` the form's version, the size of
every file and the digest of ``state.json``: a header of safetensors betrays a change by itself, a number in JSON cannot.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stratagem.checkpoint.manifest import FILE_NAME, MANIFEST, STATE, make_manifest, read_manifest, refuse_foreign
from stratagem.checkpoint.refusal import not_written
from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.errors import CheckpointDamagedError, CheckpointError
from stratagem.storage import atomic_directory

__all__ = ["DirectoryFormat"]

_FILE_OF = {"state_dict": "model"}
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}


@final
class DirectoryFormat:
    """Write and read a checkpoint directory."""

    def save(self, tree: StateTree, path: Path) -> None:
        """Write ``tree`` aside and publish it under ``path`` by one rename.

        Raises:
            CheckpointError: if a value cannot be stored, the file system refuses, or there is a folder with something
                else; what was at ``path`` stays.
        """
        _check_names(tree)
        parts = {name: split_tree(part, where=name) for name, part in tree.items()}
        refuse_foreign(path)
        try:
            with atomic_directory(path) as aside:
                skeletons = {name: skeleton for name, (_, skeleton) in parts.items()}
                state = _write_json(aside / STATE, skeletons)
                sizes = {STATE: len(state)}
                for name, (tensors, _) in parts.items():
                    if tensors:
                        file = aside / _file_of(name)
                        _write_tensors(file, tensors, part=name)
                        # safetensors makes files that only their owner may read.
                        shutil.copymode(aside / STATE, file)
                        sizes[file.name] = file.stat().st_size
                # Last: a directory without it is no checkpoint.
                _write_json(aside / MANIFEST, make_manifest(tree, sizes, state))
        except (OSError, ValueError, SafetensorError) as error:
            raise not_written(path, error) from error

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
        skeletons = _read_skeletons(path / STATE, manifest["state_sha256"])
        tree = {}
        for name, skeleton in skeletons.items():
            if parts is not None and name not in parts:
                continue
            file = path / _file_of(name)
            tensors = _read_tensors(file, map_location) if file.name in manifest["files"] else {}
            try:
                tree[name] = join_tree(tensors, skeleton)
            except CheckpointDamagedError as error:
                raise CheckpointDamagedError(f"{file}: {error}") from error
        return tree


def _check_names(tree: StateTree) -> None:
    """Refuse parts that have no file of their own in the directory."""
    for name in tree:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"The checkpoint has a part {name!r}, but parts are files: their names are strings that do not begin "
                "with a dot and have no slash, backslash or colon. Rename it."
            )
    for name, stem in _FILE_OF.items():
        if name in tree and stem in tree:
            raise CheckpointError(
                f"The checkpoint has parts {name!r} and {stem!r}, which are one file. Rename {stem!r}."
            )


def _file_of(part: str) -> str:
    return f"{_FILE_OF.get(part, part)}.safetensors"


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], *, part: str) -> None:
    """Write tensors; safetensors takes contiguous ones that share no memory, so a tied weight is written twice."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        _check_storable(tensor, f"{part}/{name}")
        # Views that are conjugated or negated when they are read would be written as they lie in memory.
        copy = tensor.to("cpu").resolve_conj().resolve_neg().contiguous()
        storage = copy.untyped_storage().data_ptr()
        if storage in seen:
            copy = copy.clone()
            storage = copy.untyped_storage().data_ptr()
        seen.add(storage)
        separate[name] = copy
    save_file(separate, file)


def _check_storable(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        kind = "on the meta device" if tensor.is_meta else f"of {tensor.dtype} and {tensor.layout}"
        raise CheckpointError(
            f"The checkpoint's {name} is a tensor {kind}, which safetensors cannot hold. Convert it first, or save "
            "under a name that ends in .pth."
        )


def _read_tensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    # Apart: safetensors knows few devices, and one that it does not know is no damage.
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _write_json(file: Path, content: Any) -> bytes:
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    file.write_bytes(data)
    return data


def _read_skeletons(file: Path, digest: str) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        skeletons = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != digest or not isinstance(skeletons, dict):
        raise CheckpointDamagedError(f"{file} is not what was written: its SHA-256 differs from the manifest's.")
    return skeletons


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointDamagedError(f"{file} has {actual} bytes, but {size} were written: it was cut off or changed.")
