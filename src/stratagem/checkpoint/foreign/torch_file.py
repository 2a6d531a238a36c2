"""Open a file that ``torch.save`` wrote, of its zip form or of the one before, without executing anything from it.

The form decides which reader it is, never the failure of another: the zip form is read by :mod:`~stratagem.checkpoint.
inert`, the form before it by torch with ``weights_only=True``, which refuses whatever is more than plain values.
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
    """Give what the file holds; within the block its parts can be read, with tensors on ``device``.

    Raises:
        CheckpointNotFoundError: if there is no such file.
        CheckpointError: if it is something else, or what is read holds objects. Errors name the file.
        CheckpointDamagedError: if it cannot be read.
    """
    with _named(path):
        if not _is_zip(path):
            yield _contents(_read_old_form(path, device), lambda node, _: node)
            return
        with TorchArchive(path) as archive:
            yield _contents(archive.root(), ValueBuilder(archive, device).of)


def verify_torch_file(path: Path) -> int:
    """Compare all of a file with its checksums, 32 bits each; return how many bytes it has.

    The form before 1.6 has none: reading such a file is the only check.

    Raises:
        CheckpointNotFoundError: if there is no such file.
        CheckpointError: if it is something else.
        CheckpointDamagedError: if a part of it is not what was written.
    """
    with _named(path):
        if _is_zip(path):
            with TorchArchive(path) as archive:
                archive.check()
        return path.stat().st_size


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Refuse what is no file, and have errors name it."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a checkpoint with such a name is a single file.")
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
    try:
        yield
    except (OSError, CheckpointDamagedError) as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def read_torch_file(path: Path, device: torch.device | str) -> Any:
    """Return all that the file holds; raises what :func:`open_torch_file` does."""
    with open_torch_file(path, device) as contents:
        return contents.read(contents.whole, "root")


def _contents(whole: Any, read: Any) -> LazyCheckpoint:
    root = mapping_items(whole)
    if root is None:
        raise CheckpointError(_no_mapping(whole))
    if not all(isinstance(key, str | int | float) for key in root):
        raise CheckpointError("it has keys that are neither text nor numbers; a checkpoint has the names of its parts.")
    return LazyCheckpoint(whole, root, read)


def _no_mapping(whole: Any) -> str:
    if not isinstance(whole, PickledObject):
        return f"it holds a {type(whole).__name__}; a checkpoint is a dict."
    if whole.kind.startswith("torch._utils._rebuild"):
        return "it holds a Tensor; a checkpoint is a dict."
    return (
        f"it holds an object of {printable(whole.kind)}, perhaps a whole model, and not the state of one. Nothing was "
        "executed. Where that class is installed, and only if you trust the file: torch.save(torch.load(path, weights_only=False)"
        ".state_dict(), 'weights.pth')."
    )


def is_torch_zip(path: Path) -> bool:
    """Return whether a file begins as ``torch.save`` has written files since torch 1.6."""
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP_START)) == _ZIP_START
    except OSError:
        return False


def _is_zip(path: Path) -> bool:
    return is_torch_zip(path) or zipfile.is_zipfile(path)


def _read_old_form(path: Path, device: torch.device | str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it is no checkpoint, or one of torch's form before 1.6 with objects in it, which is not read: "
            f"{_first_line(error)} If you trust it, save it anew with a recent torch."
        ) from error
    except Exception as error:  # which class it is hangs on where the file is damaged
        raise CheckpointDamagedError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
