"""Check the file system of a run folder with the operations that saving a checkpoint uses."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from stratagem.cli.doctor.finding import Finding
from stratagem.storage import fsync_directory, fsync_file, write_bytes

__all__ = ["check_folder"]

_SUBJECT = "file system"
_SLOW_S = 0.5
_LOW_SPACE_BYTES = 10 * 2**30
_CONTENT = b"stratagem" * 1000


def check_folder(folder: Path) -> list[Finding]:
    """Check the free space, and write, sync and rename files in ``folder`` or its closest existing parent.

    Leaves no files behind.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    findings = [_check_free_space(existing)]
    try:
        with tempfile.TemporaryDirectory(prefix=".stratagem-doctor-", dir=existing) as temporary:
            findings.append(_check_atomic_save(Path(temporary)))
    except OSError as error:
        findings.append(Finding.problem(_SUBJECT, f"{existing}: {error}", "Choose a different folder: --work-dir."))
    return findings


def _check_free_space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < _LOW_SPACE_BYTES:
        return Finding.warning(_SUBJECT, found, "A checkpoint with Adam's moments takes 12 to 16 bytes per parameter.")
    return Finding.ok(_SUBJECT, found)


def _check_atomic_save(folder: Path) -> Finding:
    """Perform the steps of saving a checkpoint: sync a file in a new folder, rename the folder, and sync its parent."""
    new, published = folder / "new", folder / "published"
    began = time.monotonic()
    new.mkdir()
    write_bytes(new / "file", _CONTENT)
    fsync_file(new / "file")
    fsync_directory(new)
    new.rename(published)
    fsync_directory(folder)
    took = time.monotonic() - began
    if new.exists() or (published / "file").read_bytes() != _CONTENT:
        return Finding.problem(
            _SUBJECT,
            f"{folder.parent}: a folder was incomplete after it was renamed",
            "Choose a different folder: --work-dir.",
        )
    found = f"{folder.parent}: sync and rename work, {1e3 * took:.0f} ms"
    if took > _SLOW_S:
        return Finding.warning(
            _SUBJECT, found, "Saving checkpoints is slow: save less often, or use a faster file system."
        )
    return Finding.ok(_SUBJECT, found)
