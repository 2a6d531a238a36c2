"""Write a checkpoint for distribution: a single file with selected parts, whose name contains a digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stratagem.checkpoint.formats.choice import SINGLE_FILES, format_for
from stratagem.checkpoint.formats.single_file import SingleFileFormat
from stratagem.checkpoint.tree.evaluated import evaluated_weights
from stratagem.checkpoint.tree.names import AVERAGE_PART
from stratagem.errors import ConfigKeyError
from stratagem.storage import fsync_directory, operations
from stratagem.storage.temporary import temporary_path
from stratagem.utils import did_you_mean

__all__ = ["is_released", "release_checkpoint"]

# The key in the meta of a released file; the rest of its meta is copied from the checkpoint.
_RELEASED: Final = "released_from"
_NAME: Final = re.compile(r".+-[0-9a-f]{8}\.pth")


def release_checkpoint(path: Path, parts: Sequence[str]) -> Path:
    """Write selected parts of a checkpoint to ``<stem>-<sha256[:8]>.pth`` in the same folder; return the path.

    If the run averaged its weights, ``state_dict`` contains the averaged weights, which the run used for evaluation. If
    ``average`` is also selected, ``state_dict`` contains the trained weights.

    Raises:
        ConfigKeyError: if the checkpoint does not have one of the parts.
        CheckpointError: if the checkpoint cannot be read or the file cannot be written.
    """
    tree = format_for(path).load(path)
    missing = [part for part in parts if part not in tree]
    if missing:
        raise ConfigKeyError(f"{path} has no part {missing[0]!r} to publish. {did_you_mean(missing[0], list(tree))}")
    stem = path.stem if path.suffix in SINGLE_FILES else path.name
    temporary = temporary_path(path.with_name(f"{stem}.pth"))
    released_tree = {part: tree[part] for part in parts}
    if "state_dict" in parts and AVERAGE_PART not in parts and isinstance(tree["state_dict"], Mapping):
        released_tree["state_dict"] = evaluated_weights(tree, tree["state_dict"])
    if isinstance(tree.get("meta"), Mapping) and "meta" in parts:
        released_tree["meta"] = {**tree["meta"], _RELEASED: path.name}
    SingleFileFormat().save(released_tree, temporary)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    released = path.with_name(f"{stem}-{digest[:8]}.pth")
    operations.rename(temporary, released)
    fsync_directory(path.parent)
    return released


def is_released(path: Path, meta: Mapping[str, Any], parts: Collection[str]) -> bool:
    """Return whether a single file with this ``meta`` and these parts was written by :func:`release_checkpoint`."""
    # Older versions did not add this key. Recognize their files by the digest in the name and by the absence of parts
    # that every checkpoint of a run has.
    return isinstance(meta.get(_RELEASED), str) or (
        _NAME.fullmatch(path.name) is not None and not {"hooks", "generators"} & set(parts)
    )
