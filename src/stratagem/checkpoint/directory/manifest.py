"""What a checkpoint directory says of itself: its form, its files and tensors, and where its run stood."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratagem.checkpoint.catalog.order import SAVE_ORDER, SaveOrder
from stratagem.checkpoint.directory.box_io import WrittenBox
from stratagem.checkpoint.directory.extra_files import are_extra_files_valid
from stratagem.checkpoint.directory.integrity import ALGORITHM, digest_of, parse_json
from stratagem.checkpoint.directory.tensor_layout import DTYPES, FileLayout, TensorSpec
from stratagem.checkpoint.tree.boxes import TensorBox, boxes_cover
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = [
    "FILE_NAME",
    "MANIFEST",
    "MOST_JSON",
    "STATE",
    "describe_tensors",
    "make_manifest",
    "written_boxes",
    "read_json_file",
    "read_manifest",
    "check_replaceable",
]

MANIFEST = "manifest.json"
STATE = "state.json"
# In bytes. Larger ones are neither written nor read, so that no file can claim all of the memory.
MOST_JSON = 1 << 30
# What is a file's name on every system, and stays inside of the directory.
FILE_NAME = re.compile(r"[^./\\:\x00][^/\\:\x00]*")
_FORMAT = "stratagem-checkpoint"
_VERSION = 2
# The text ends in the digest of all before it.
_SEAL = re.compile(rb'\A(.*),"digest":"([0-9a-f]{64})"}\Z', re.DOTALL)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory: what it is, its files and where its run stood.

    Raises:
        CheckpointNotFoundError: if there is no such directory.
        CheckpointError: if it is not a checkpoint of ours, or of another version.
        CheckpointDamagedError: if the manifest cannot be read, or is not what was written.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    file = path / MANIFEST
    if not file.is_file():
        if (path / STATE).is_file():
            raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
        raise CheckpointError(
            f"{path} is not a checkpoint of Stratagem: it has no {MANIFEST}. A checkpoint is a directory such as "
            "work_dirs/<name>/epoch_3, or a single .pth file."
        )
    data, manifest = _read(file)
    if not _is_ours(manifest):
        raise CheckpointError(f"{file} belongs to another program; this is not a checkpoint of Stratagem.")
    sealed = _SEAL.fullmatch(data)
    # Before the version, which may be what was damaged.
    if sealed is not None and digest_of(sealed[1]) != sealed[2].decode():
        raise CheckpointDamagedError(f"{file} is not what was written: its digest differs.")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{file}: the checkpoint has version {manifest.get('version')} of the format, this Stratagem reads version "
            f"{_VERSION}. Read it with the version that wrote it ({manifest.get('stratagem')})."
        )
    if sealed is None or not _is_complete(manifest):
        raise CheckpointDamagedError(f"{file} cannot be read: it does not say what was written, or when.")
    return manifest


def make_manifest(
    meta: Any,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    extra_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """Return the text of a manifest.

    Args:
        meta: the tree's part of that name, from which the position, the run, its order and the purpose are taken.
        files: name -> its size and digests.
        tensors: part -> what :func:`describe_tensors` says of it.
        extra_files: path -> size and digest, of files that are not ours.
    """
    meta = meta if isinstance(meta, Mapping) else {}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "stratagem": meta.get("stratagem"),
        "saved_at": time.time(),
        "run_id": meta.get("run_id"),
        **_save_order(meta),
        "purpose": meta.get("purpose"),
        "position": {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)},
        "finite": meta.get("finite") is not False,
        "algorithm": ALGORITHM,
        "files": dict(files),
        "tensors": dict(tensors),
        **({"beside": dict(extra_files)} if extra_files else {}),
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return text + b',"digest":"' + digest_of(text).encode() + b'"}'


def _save_order(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field with the place among the run's checkpoints; none for a checkpoint that was saved without a run."""
    try:
        order = SaveOrder.from_meta(meta.get(SAVE_ORDER))
    except ValueError:
        # A value of the user's own under this name.
        return {}
    return {} if order is None else {SAVE_ORDER: order.as_meta()}


def describe_tensors(layout: FileLayout, written: Iterable[WrittenBox]) -> dict[str, Any]:
    """Return what the manifest says of the tensors of a file: type, shape, and the digest of each piece."""
    described: dict[str, Any] = {
        name: {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "pieces": []}
        for name, spec in layout.specs.items()
    }
    for piece in written:
        described[piece.name]["pieces"].append([list(piece.box.start), list(piece.box.shape), piece.digest])
    return described


def written_boxes(described: Mapping[str, Any], layout: FileLayout) -> list[WrittenBox]:
    """Return the pieces that a manifest describes for the tensors of a file of that layout.

    Raises:
        CheckpointDamagedError: if it describes others than the file has, or pieces that are not all of a tensor.
    """
    if set(described) != set(layout.specs):
        raise CheckpointDamagedError("it does not hold the tensors that the manifest names.")
    return [piece for name, tensor in described.items() for piece in _pieces(name, tensor, layout.specs[name])]


def _pieces(name: str, tensor: Any, spec: TensorSpec) -> list[WrittenBox]:
    try:
        if (tensor["dtype"], tuple(tensor["shape"])) != (DTYPES[spec.dtype], spec.shape):
            raise ValueError(f"the file has it as {DTYPES[spec.dtype]} of shape {list(spec.shape)}")
        pieces = [
            WrittenBox(name, TensorBox(_sizes(start), _sizes(shape)), digest)
            for start, shape, digest in tensor["pieces"]
        ]
        if not boxes_cover([piece.box for piece in pieces], spec.shape):
            raise ValueError("its pieces do not make it up")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(f"the manifest does not describe the tensor {name!r}: {error}") from error
    return pieces


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers!r} are no sizes")
    return tuple(numbers)


def read_json_file(file: Path) -> bytes:
    """Return the bytes of a file of JSON.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than any that is written.
    """
    if file.stat().st_size > MOST_JSON:
        raise ValueError(f"it has {file.stat().st_size} bytes, more than any that is written")
    return file.read_bytes()


def check_replaceable(path: Path) -> None:
    """Refuse to replace a folder that holds something else: all in it would be lost.

    Raises:
        CheckpointError: if it is not empty and no checkpoint of ours, sound or damaged.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        data, manifest = _read(path / MANIFEST)
        # A seal tells ours where the word itself was damaged.
        ours = _is_ours(manifest) or ((path / STATE).is_file() and _SEAL.fullmatch(data) is not None)
    except CheckpointDamagedError:
        ours = (path / STATE).is_file()
    if not ours:
        raise CheckpointError(
            f"{path} is a folder with something other than a checkpoint, which saving would replace. Choose a name in it, "
            f"such as {path / 'checkpoint'}."
        )


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Tell whether the manifest says what this version needs, in the form that it needs."""
    saved_at, files, tensors = manifest.get("saved_at"), manifest.get("files"), manifest.get("tensors")
    return (
        isinstance(saved_at, float)
        and math.isfinite(saved_at)
        and isinstance(files, dict)
        and all(FILE_NAME.fullmatch(name) and _is_described(name, file) for name, file in files.items())
        and STATE in files
        and isinstance(tensors, dict)
        and all(isinstance(described, dict) for described in tensors.values())
        and are_extra_files_valid(manifest.get("beside", {}))
        and type(manifest.get("finite")) is bool
        and manifest.get("algorithm") == ALGORITHM
    )


def _is_described(name: str, file: Any) -> bool:
    """Tell whether there is the size of a file, and a digest of all of it or of its header."""
    if not _has_digest(file):
        return (
            isinstance(file, dict) and name != STATE and _is_size(file.get("bytes")) and _has_digest(file.get("header"))
        )
    return name == STATE


def _has_digest(said: Any) -> bool:
    return isinstance(said, dict) and _is_size(said.get("bytes")) and isinstance(said.get("digest"), str)


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        data = read_json_file(file)
        return data, parse_json(data)
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
