"""Checkpoints to hand out: a single file with only some parts, named by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from stratagem.checkpoint.formats import SINGLE_FILES, format_for
from stratagem.checkpoint.single_file import SingleFileFormat
from stratagem.errors import ConfigKeyError
from stratagem.storage import fsync_directory, operations
from stratagem.storage.temporary import temporary_path
from stratagem.utils import did_you_mean

__all__ = ["release_checkpoint"]


def release_checkpoint(path: Path, parts: Sequence[str]) -> Path:
    """Write some parts of a checkpoint to ``<stem>-<sha256[:8]>.pth`` beside it; return that path.

    Raises:
        ConfigKeyError: if it lacks one of the parts.
        CheckpointError: if it cannot be read, or the file not be written.
    """
    tree = format_for(path).load(path)
    missing = [part for part in parts if part not in tree]
    if missing:
        raise ConfigKeyError(f"{path} has no part {missing[0]!r} to publish. {did_you_mean(missing[0], list(tree))}")
    stem = path.stem if path.suffix in SINGLE_FILES else path.name
    aside = temporary_path(path.with_name(f"{stem}.pth"))
    SingleFileFormat().save({part: tree[part] for part in parts}, aside)
    with aside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    released = path.with_name(f"{stem}-{digest[:8]}.pth")
    operations.rename(aside, released)
    fsync_directory(path.parent)
    return released
