"""Find the checkpoint from which a run goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from stratagem.checkpoint.foreign import is_deepspeed_folder
from stratagem.checkpoint.manifest import MANIFEST, read_manifest
from stratagem.checkpoint.pointer import pointed_at
from stratagem.checkpoint.single_file import SingleFileFormat
from stratagem.errors import CheckpointError

__all__ = ["Candidate", "find_latest_checkpoint", "list_checkpoints"]

_NUMBERED = re.compile(r"(epoch|iter)_(?P<number>[0-9]+)(\.pth)?")

_NOT_FINITE = "its weights are not all finite."


@final
@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A checkpoint in a run's folder.

    Attributes:
        saved_at: when it was saved, in seconds since the epoch.
        number: its number of epochs or iterations, 0 where the name tells none.
        path: where it is.
        fault: why a run cannot go on from it, as far as its manifest tells; empty where it can.
        position: the epochs and iterations that were done, where the manifest tells.
    """

    saved_at: float
    # The clock of a file system ticks seldom: of files made at once the number tells the later.
    number: int
    path: Path
    fault: str = ""
    position: Mapping[str, int] = field(default_factory=dict, compare=False)


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of ``folder`` that was completed last, or None where there is none.

    A checkpoint appears under its name only when it is complete, so what a killed save left is never found. Its tensors
    are not read: loading it does that. Single files count where they are named ``epoch_<n>.pth`` or ``iter_<n>.pth``.
    One whose weights were not all finite is passed over.
    """
    return next((found.path for found in list_checkpoints(folder) if not found.fault), None)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Candidate]:
    """Return the checkpoints of ``folder``, the one saved last first, with the faults of those that cannot be used.

    Where ``last_checkpoint`` in it names one in another folder, as that of a run does which saves elsewhere, those of that
    folder are among them.
    """
    own = Path(folder)
    elsewhere = pointed_at(own)
    folders = dict.fromkeys([own, own if elsewhere is None else elsewhere.parent])
    entries = [entry for each in folders if each.is_dir() for entry in each.iterdir()]
    found = (_look_at(entry) for entry in entries if not entry.name.startswith("."))
    return sorted((each for each in found if each is not None), reverse=True)


def _look_at(entry: Path) -> Candidate | None:
    numbered = _NUMBERED.fullmatch(entry.name)
    number = int(numbered["number"]) if numbered else 0
    if numbered and is_deepspeed_folder(entry):
        return Candidate(entry.stat().st_mtime, number, entry)
    if entry.is_dir() and (numbered or (entry / MANIFEST).is_file()):
        try:
            manifest = read_manifest(entry)
        except CheckpointError as error:
            # Without its own word, the system's must do for when it was made.
            return Candidate(entry.stat().st_mtime, number, entry, str(error)) if numbered else None
        fault = "" if manifest["finite"] else _NOT_FINITE
        return Candidate(manifest["saved_at"], number, entry, fault, manifest["position"])
    if numbered and entry.suffix == ".pth" and entry.is_file():
        return _look_at_file(entry, number)
    return None


def _look_at_file(entry: Path, number: int) -> Candidate:
    saved_at = entry.stat().st_mtime
    try:
        # Its pickle is read, and not its tensors.
        meta = SingleFileFormat().load(entry, parts={"meta"}).get("meta")
    except CheckpointError as error:
        return Candidate(saved_at, number, entry, str(error))
    meta = meta if isinstance(meta, Mapping) else {}
    fault = _NOT_FINITE if meta.get("finite") is False else ""
    position = {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)}
    return Candidate(saved_at, number, entry, fault, position)
