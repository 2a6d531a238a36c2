"""Examine the file system on which a run's folder lies, by doing there what saving a checkpoint does."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from stratagem.cli.doctor.finding import Finding
from stratagem.storage import fsync_directory, fsync_file, write_bytes

__all__ = ["examine_folder"]

_SUBJECT = "file system"
_SLOW_S = 0.5
_LITTLE_BYTES = 10 * 2**30
_PIECE = b"stratagem" * 1000


def examine_folder(folder: Path) -> list[Finding]:
    """Write, sync and rename in ``folder``, or in the nearest folder above it that exists; leave nothing there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    findings = [_room(there)]
    try:
        with tempfile.TemporaryDirectory(prefix=".stratagem-doctor-", dir=there) as made:
            findings.append(_publish(Path(made)))
    except OSError as error:
        findings.append(Finding.problem(_SUBJECT, f"{there}: {error}", "Give another folder: --work-dir."))
    return findings


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < _LITTLE_BYTES:
        return Finding.note(_SUBJECT, found, "A checkpoint with Adam's moments takes 12 to 16 bytes a parameter.")
    return Finding.good(_SUBJECT, found)


def _publish(folder: Path) -> Finding:
    """Do what publishing a checkpoint does: sync a file in a folder, rename that over nothing, sync the parent."""
    new, published = folder / "new", folder / "published"
    began = time.monotonic()
    new.mkdir()
    write_bytes(new / "piece", _PIECE)
    fsync_file(new / "piece")
    fsync_directory(new)
    new.rename(published)
    fsync_directory(folder)
    took = time.monotonic() - began
    if new.exists() or (published / "piece").read_bytes() != _PIECE:
        return Finding.problem(
            _SUBJECT, f"{folder.parent}: a folder that was renamed is not whole", "Save elsewhere: --work-dir."
        )
    found = f"{folder.parent}: sync and rename work, {1e3 * took:.0f} ms"
    if took > _SLOW_S:
        return Finding.note(_SUBJECT, found, "Checkpoints wait for it. Save less often, or to a faster file system.")
    return Finding.good(_SUBJECT, found)
