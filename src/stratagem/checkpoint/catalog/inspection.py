"""Read the metadata of a checkpoint without reading its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint.catalog.order import SAVE_ORDER, SaveOrder
from stratagem.checkpoint.catalog.retention_tag import WEIGHTS_ONLY, RetentionTag
from stratagem.checkpoint.directory.manifest import MANIFEST, STATE, read_manifest
from stratagem.checkpoint.foreign import deepspeed_meta, is_deepspeed_folder, is_torch_zip
from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.checkpoint.formats.release import is_released
from stratagem.checkpoint.formats.single_file import read_meta
from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = ["CheckpointInfo", "SavedCheckpoint", "inspect_checkpoint"]

# The names of MMEngine checkpoints, which can only be recognized by name because they contain no run ID.
_NUMBERED = re.compile(r"(epoch|iter)_(?P<number>[0-9]+)(\.pth)?")
_NOT_FINITE = "its weights contain NaN or Inf."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that a run saved; ``finite`` is False if its weights contain NaN or Inf."""

    path: Path
    saved_at: float
    iter: int
    retention_tag: RetentionTag
    finite: bool = True
    order: SaveOrder | None = None


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The metadata of a checkpoint.

    Attributes:
        path: the path of the checkpoint.
        saved_at: the time of the save in seconds since the epoch; for a single file, its modification time.
        number: the epoch or iteration in its name, otherwise its recorded iteration; 0 if neither is known.
        fault: the reason why a run cannot resume from it, as far as this can be determined without reading tensors;
            empty if no fault was found.
        position: the number of finished epochs and iterations, if recorded.
        run_id: the ID of the run that saved it, if recorded.
        order: its sort key within the run, if recorded.
        retention_tag: why it was saved.
        finite: False if its weights contained NaN or Inf when it was saved.
        is_removable: False for a folder in DeepSpeed's format, which has no manifest, so the files that belong to it are unknown.
    """

    path: Path
    saved_at: float
    number: int = 0
    fault: str = ""
    position: Mapping[str, int] = field(default_factory=dict)
    run_id: str | None = None
    order: SaveOrder | None = None
    retention_tag: RetentionTag = field(default_factory=RetentionTag)
    finite: bool = True
    is_removable: bool = True

    @property
    def is_weights_only(self) -> bool:
        """Whether it was saved without the optimizer, for evaluation rather than for resuming."""
        return self.retention_tag.group == WEIGHTS_ONLY

    @cached_property
    def saved(self) -> SavedCheckpoint:
        """The same checkpoint, as retention sees it."""
        return SavedCheckpoint(
            path=self.path,
            saved_at=self.saved_at,
            iter=self.position.get("iter", 0),
            retention_tag=self.retention_tag,
            finite=self.finite,
            order=self.order,
        )


def inspect_checkpoint(path: Path) -> CheckpointInfo | None:
    """Return the metadata of a file or directory; None if it is not a checkpoint that a run or a strategy saved.

    A checkpoint is recognized by its contents: a manifest, or the ``meta`` of a single file or of a directory in
    DeepSpeed's format. In addition, everything named ``epoch_<n>`` or ``iter_<n>``, with or without ``.pth``, counts as
    a checkpoint. Files written by ``published_keys`` do not count.
    """
    match = _NUMBERED.fullmatch(path.name)
    number = int(match["number"]) if match else None
    try:
        if path.is_dir():
            return None if path.suffix == ".pth" and match else _inspect_folder(path, number)
        if path.suffix in SINGLE_FILES and path.is_file():
            return _inspect_file(path, number)
    except OSError:
        # Another process has just removed it, or this user does not have permission to read it.
        pass
    return None


def _inspect_folder(path: Path, number: int | None) -> CheckpointInfo | None:
    has_manifest = (path / MANIFEST).is_file()
    if not has_manifest and _is_deepspeed(path, number):
        return _inspect_deepspeed(path, number)
    # Stratagem writes both the manifest and the state file, so the checkpoint is incomplete if either is missing.
    expected_checkpoint = number is not None or (path / STATE).is_file()
    if not (has_manifest or expected_checkpoint):
        return None
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return _faulty(path, number, error) if expected_checkpoint else None
    position = manifest.get("position")
    facts = {**manifest, **(position if isinstance(position, Mapping) else {})}
    return _make_info(path, number, manifest["saved_at"], facts)


def _is_deepspeed(path: Path, number: int | None) -> bool:
    # DeepSpeed creates two nested folders. Unless the folder is named like a checkpoint, accept only the outer one,
    # which contains the file "latest".
    try:
        return (number is not None or (path / "latest").is_file()) and is_deepspeed_folder(path)
    except CheckpointError:
        return False


def _inspect_deepspeed(path: Path, number: int | None) -> CheckpointInfo | None:
    try:
        meta = deepspeed_meta(path)
    except CheckpointError as error:
        return _faulty(path, number, error)
    if number is None and not _saved_by_stratagem(meta):
        return None
    return replace(_make_info(path, number, path.stat().st_mtime, meta), is_removable=False)


def _inspect_file(path: Path, number: int | None) -> CheckpointInfo | None:
    if number is None and not is_torch_zip(path):
        # Stratagem does not write torch's legacy format, and its metadata cannot be read without the tensors.
        return _inspect_blank(path)
    try:
        meta, parts = read_meta(path)
    except CheckpointDamagedError as error:
        return _faulty(path, number, error)
    except CheckpointError as error:
        return None if number is None else _faulty(path, number, error)
    if number is None and (not _saved_by_stratagem(meta) or is_released(path, meta, parts)):
        return None
    return _make_info(path, number, path.stat().st_mtime, meta)


def _inspect_blank(path: Path) -> CheckpointInfo | None:
    """Return a fault for a file that is empty or starts with zeros; None for other files.

    A system crash can leave such a file.
    """
    if path.suffix == ".bin":  # The file may contain arbitrary data.
        return None
    with path.open("rb") as file:
        beginning = file.read(64)
    if any(beginning):
        return None
    fault = f"{path} cannot be read: it {'begins with zeros' if beginning else 'is empty'}."
    return CheckpointInfo(path=path, saved_at=path.stat().st_mtime, fault=fault)


def _saved_by_stratagem(meta: Mapping[str, Any]) -> bool:
    """Return whether a run, or a strategy in a user's training loop, saved the checkpoint."""
    return isinstance(meta.get("run_id"), str) or isinstance(meta.get("stratagem"), str)


def _faulty(path: Path, number: int | None, error: CheckpointError) -> CheckpointInfo:
    return CheckpointInfo(path=path, saved_at=path.stat().st_mtime, number=number or 0, fault=str(error))


def _make_info(path: Path, number: int | None, saved_at: float, facts: Mapping[str, Any]) -> CheckpointInfo:
    position = {key: facts[key] for key in ("epoch", "iter") if isinstance(facts.get(key), int)}
    number = position.get("iter", 0) if number is None else number
    try:
        order = SaveOrder.from_meta(facts.get(SAVE_ORDER))
    except ValueError as error:
        return CheckpointInfo(path=path, saved_at=saved_at, number=number, fault=str(error), position=position)
    finite = facts.get("finite") is not False
    run_id = facts.get("run_id")
    return CheckpointInfo(
        path=path,
        saved_at=saved_at,
        number=number,
        fault="" if finite else _NOT_FINITE,
        position=position,
        run_id=run_id if isinstance(run_id, str) else None,
        order=order,
        retention_tag=RetentionTag.from_meta(facts.get("purpose")),
        finite=finite,
    )
