"""Open files written by ``torch.save``, in its zip format or its legacy format, without executing code from them.

The reader depends only on the file's format. Zip files are read by :mod:`~stratagem.checkpoint.restricted_unpickler`,
legacy files by torch with ``weights_only=True``, which rejects everything but plain values.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint
from stratagem.checkpoint.restricted_unpickler import (
    PickledObject,
    TorchArchive,
    ValueBuilder,
    mapping_items,
    printable,
)
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = ["is_torch_zip", "open_torch_file", "read_torch_file", "verify_torch_file"]

_ZIP_START = b"PK\x03\x04"


@contextmanager
def open_torch_file(path: Path, device: torch.device | str) -> Iterator[LazyCheckpoint]:
    """Open a file; its parts can be read within the context, with tensors on ``device``.

    Raises:
        CheckpointNotFoundError: if the file does not exist.
        CheckpointError: if the file has unexpected contents, or a part that is read contains objects. The message
            contains the name of the file.
        CheckpointDamagedError: if the file cannot be read.
    """
    with _errors_with_path(path):
        if not _is_zip(path):
            yield _open_root(_read_legacy(path, device), lambda node, _: node)
            return
        with TorchArchive(path) as archive:
            yield _open_root(archive.root(), ValueBuilder(archive, device).build)


def verify_torch_file(path: Path) -> int:
    """Compare a file with its 32-bit checksums; return its size in bytes.

    Files in the legacy format (before torch 1.6) have no checksums.

    Raises:
        CheckpointNotFoundError: if the file does not exist.
        CheckpointError: if the file contains something else.
        CheckpointDamagedError: if the file is corrupted.
    """
    with _errors_with_path(path):
        if _is_zip(path):
            with TorchArchive(path) as archive:
                archive.check()
        return path.stat().st_size


@contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Check that ``path`` is a file, and add its name to errors."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, but a checkpoint with this suffix must be a single file.")
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    try:
        yield
    except (OSError, CheckpointDamagedError) as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def read_torch_file(path: Path, device: torch.device | str) -> Any:
    """Return the entire contents of a file; raises the errors of :func:`open_torch_file`."""
    with open_torch_file(path, device) as checkpoint:
        return checkpoint.read(checkpoint.root, "root")


def _open_root(root: Any, read: Any) -> LazyCheckpoint:
    entries = mapping_items(root)
    if entries is None:
        raise CheckpointError(_not_a_dict_message(root))
    if not all(isinstance(key, str | int | float) for key in entries):
        raise CheckpointError(
            "it has keys that are neither strings nor numbers; expected the names of checkpoint parts."
        )
    return LazyCheckpoint(root, entries, read)


def _not_a_dict_message(root: Any) -> str:
    if not isinstance(root, PickledObject):
        return f"it contains a {type(root).__name__}; expected a dict."
    if root.qualified_name.startswith("torch._utils._rebuild"):
        return "it contains a Tensor; expected a dict."
    return (
        f"it contains an object of type {printable(root.qualified_name)}, such as a whole model instead of its state "
        "dict. No code from it was executed. If you trust it, convert it in an environment where that class is "
        "installed: torch.save(torch.load(path, weights_only=False).state_dict(), 'weights.pth')."
    )


def is_torch_zip(path: Path) -> bool:
    """Return whether a file starts with the signature of torch's zip format (torch 1.6 and later)."""
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP_START)) == _ZIP_START
    except OSError:
        return False


def _is_zip(path: Path) -> bool:
    return is_torch_zip(path) or zipfile.is_zipfile(path)


def _read_legacy(path: Path, device: torch.device | str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it is not a checkpoint, or a file in torch's legacy format (before 1.6) that contains objects, which is not "
            f"supported: {_first_line(error)} If you trust it, save it again with a recent torch version."
        ) from error
    except Exception as error:  # The error class depends on where the file is damaged.
        raise CheckpointDamagedError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
