"""Checkpoints to hand out: a single file with only some parts, named by its content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stratagem.checkpoint.formats.choice import SINGLE_FILES, format_for
from stratagem.checkpoint.formats.single_file import SingleFileFormat
from stratagem.errors import ConfigKeyError
from stratagem.storage import fsync_directory, operations
from stratagem.storage.temporary import temporary_path
from stratagem.utils import did_you_mean

__all__ = ["is_released", "release_checkpoint"]

# Marks the meta of such a file, which otherwise is that of the checkpoint.
_RELEASED: Final = "released_from"
_NAME: Final = re.compile(r".+-[0-9a-f]{8}\.pth")


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
    released_tree = {part: tree[part] for part in parts}
    if isinstance(tree.get("meta"), Mapping) and "meta" in parts:
        released_tree["meta"] = {**tree["meta"], _RELEASED: path.name}
    SingleFileFormat().save(released_tree, aside)
    with aside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    released = path.with_name(f"{stem}-{digest[:8]}.pth")
    operations.rename(aside, released)
    fsync_directory(path.parent)
    return released


def is_released(path: Path, meta: Mapping[str, Any], parts: Collection[str]) -> bool:
    """Return whether a single file with this ``meta`` and these parts was written by :func:`release_checkpoint`."""
    # Files from before there was the mark have such a name, and lack what every checkpoint of a run or a strategy has.
    return isinstance(meta.get(_RELEASED), str) or (
        _NAME.fullmatch(path.name) is not None and not {"hooks", "generators"} & set(parts)
    )
