"""Write and read the manifest: format version, files and digests, tensors, and training progress."""

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
from stratagem.storage import read_bytes

__all__ = [
    "FILE_NAME",
    "MANIFEST",
    "MAX_JSON_BYTES",
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
# The maximum size of a JSON file in bytes. Larger files are neither written nor read, so that a file cannot exhaust
# memory.
MAX_JSON_BYTES = 1 << 30
# A file name that is valid on every system and stays inside the directory.
FILE_NAME = re.compile(r"[^./\\:\x00][^/\\:\x00]*")
_FORMAT = "stratagem-checkpoint"
_VERSION = 2
# The manifest ends with the digest of everything before it.
_TRAILING_DIGEST = re.compile(rb'\A(.*),"digest":"([0-9a-f]{64})"}\Z', re.DOTALL)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint directory.

    Raises:
        CheckpointNotFoundError: if the directory does not exist.
        CheckpointError: if the directory is not a Stratagem checkpoint, or has a different format version.
        CheckpointDamagedError: if the manifest is unreadable or corrupted.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    file = path / MANIFEST
    if not file.is_file():
        if (path / STATE).is_file():
            raise CheckpointDamagedError(f"{file} is missing; the checkpoint is incomplete.")
        raise CheckpointError(
            f"{path} is not a Stratagem checkpoint: it does not contain {MANIFEST}. A checkpoint is a directory such "
            "as work_dirs/<name>/epoch_3, or a single .pth file."
        )
    data, manifest = _read(file)
    if not _has_format_name(manifest):
        raise CheckpointError(f"{file} was written by a different program, so this is not a Stratagem checkpoint.")
    match = _TRAILING_DIGEST.fullmatch(data)
    # Check the digest before the version, because the version may also be corrupted.
    if match is not None and digest_of(match[1]) != match[2].decode():
        raise CheckpointDamagedError(f"{file} is corrupted: its digest does not match its content.")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{file}: the checkpoint has format version {manifest.get('version')}, but this version of Stratagem only "
            f"reads format version {_VERSION}. Load it with the version of Stratagem that wrote it "
            f"({manifest.get('stratagem')})."
        )
    if match is None or not _is_complete(manifest):
        raise CheckpointDamagedError(f"{file} cannot be read: required fields are missing or malformed.")
    return manifest


def make_manifest(
    meta: Any,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    extra_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """Return the contents of a manifest file.

    Args:
        meta: the tree's ``meta``, which provides the training progress, the run ID, the save order and the retention
            tag.
        files: file name -> its size and digests.
        tensors: part -> the result of :func:`describe_tensors`.
        extra_files: path -> size and digest of extra files.
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
    """Return the ``save_order`` field; empty for a checkpoint that was saved outside a run."""
    try:
        order = SaveOrder.from_meta(meta.get(SAVE_ORDER))
    except ValueError:
        # The user stores an unrelated value under this key.
        return {}
    return {} if order is None else {SAVE_ORDER: order.as_meta()}


def describe_tensors(layout: FileLayout, written: Iterable[WrittenBox]) -> dict[str, Any]:
    """Return the manifest's description of the tensors in a file: dtype, shape, and the digest of each box."""
    described: dict[str, Any] = {
        name: {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "pieces": []}
        for name, spec in layout.specs.items()
    }
    for written_box in written:
        described[written_box.name]["pieces"].append(
            [list(written_box.box.start), list(written_box.box.shape), written_box.digest]
        )
    return described


def written_boxes(described: Mapping[str, Any], layout: FileLayout) -> list[WrittenBox]:
    """Return the boxes that a manifest lists for the tensors of a file with this layout.

    Raises:
        CheckpointDamagedError: if the manifest and the file list different tensors, or the boxes do not cover a tensor.
    """
    if set(described) != set(layout.specs):
        raise CheckpointDamagedError("its tensors differ from the tensors listed in the manifest.")
    return [
        written_box
        for name, tensor in described.items()
        for written_box in _boxes_of_tensor(name, tensor, layout.specs[name])
    ]


def _boxes_of_tensor(name: str, tensor: Any, spec: TensorSpec) -> list[WrittenBox]:
    try:
        if (tensor["dtype"], tuple(tensor["shape"])) != (DTYPES[spec.dtype], spec.shape):
            raise ValueError(f"in the file it has dtype {DTYPES[spec.dtype]} and shape {list(spec.shape)}")
        boxes = [
            WrittenBox(name, TensorBox(_sizes(start), _sizes(shape)), digest)
            for start, shape, digest in tensor["pieces"]
        ]
        if not boxes_cover([written_box.box for written_box in boxes], spec.shape):
            raise ValueError("its boxes do not cover it exactly")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(f"the manifest's entry for the tensor {name!r} is invalid: {error}") from error
    return boxes


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers!r} is not a list of sizes")
    return tuple(numbers)


def read_json_file(file: Path) -> bytes:
    """Return the contents of a JSON file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is larger than the maximum size that Stratagem writes.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, which is larger than any file that Stratagem writes")
    return read_bytes(file)


def check_replaceable(path: Path) -> None:
    """Check that ``path`` may be replaced by a checkpoint: it does not exist, is empty, or is a checkpoint.

    Raises:
        CheckpointError: if ``path`` is a directory that contains other files. Damaged checkpoints may be replaced.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        data, manifest = _read(path / MANIFEST)
        # The trailing digest identifies a Stratagem manifest whose format name is corrupted.
        is_checkpoint = _has_format_name(manifest) or (
            (path / STATE).is_file() and _TRAILING_DIGEST.fullmatch(data) is not None
        )
    except CheckpointDamagedError:
        is_checkpoint = (path / STATE).is_file()
    if not is_checkpoint:
        raise CheckpointError(
            f"{path} is a folder that contains other files, which saving a checkpoint would overwrite. Choose a path "
            f"inside this folder, such as {path / 'checkpoint'}."
        )


def _has_format_name(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Return whether the manifest has all fields of this format version with valid types."""
    saved_at, files, tensors = manifest.get("saved_at"), manifest.get("files"), manifest.get("tensors")
    return (
        isinstance(saved_at, float)
        and math.isfinite(saved_at)
        and isinstance(files, dict)
        and all(FILE_NAME.fullmatch(name) and _is_valid_file_entry(name, file) for name, file in files.items())
        and STATE in files
        and isinstance(tensors, dict)
        and all(isinstance(described, dict) for described in tensors.values())
        and are_extra_files_valid(manifest.get("beside", {}))
        and type(manifest.get("finite")) is bool
        and manifest.get("algorithm") == ALGORITHM
    )


def _is_valid_file_entry(name: str, file: Any) -> bool:
    """Return whether the entry contains the size of the file and a digest of the whole file or of its header."""
    if not _has_digest(file):
        return (
            isinstance(file, dict) and name != STATE and _is_size(file.get("bytes")) and _has_digest(file.get("header"))
        )
    return name == STATE


def _has_digest(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_size(entry.get("bytes")) and isinstance(entry.get("digest"), str)


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        data = read_json_file(file)
        return data, parse_json(data)
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
