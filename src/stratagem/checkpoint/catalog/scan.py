"""Inspect all checkpoints of a folder again and again, reading only those that changed."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from stratagem.checkpoint.catalog.inspection import CheckpointInfo, inspect_checkpoint
from stratagem.checkpoint.directory.manifest import MANIFEST
from stratagem.utils import absolute

__all__ = ["FolderScan", "inspect_folder", "is_unchanged"]

# The folders whose checkpoints are remembered: a work directory and another folder for each of a few hooks.
_MAX_FOLDERS: Final = 8
# The resolution of time stamps on most file systems is at most 10 ms. A few store whole seconds, or every second one.
_RESOLUTION_NS: Final = 50_000_000
_COARSE_RESOLUTION_NS: Final = 2_500_000_000


def inspect_folder(folder: Path, look_up: Collection[Path] | None = None) -> list[CheckpointInfo]:
    """Return the metadata of all checkpoints in a folder, in no particular order; without hidden entries.

    The folder is listed in each call, and every checkpoint is looked up; with ``look_up``, only these and new ones. A checkpoint
    is read again if the file with its metadata (the manifest or the single file) is a different file or was written since.
    Checkpoints with a fault that a file system may cause temporarily are always read again, and so are entries that are not
    checkpoints.
    """
    with _LOCK:
        return _scan_of(folder).inspect(None if look_up is None else {path.name for path in look_up})


def is_unchanged(folder: Path, paths: Iterable[Path]) -> bool:
    """Return whether all of these checkpoints in a folder have not changed since the last :func:`inspect_folder` of it."""
    with _LOCK:
        return _scan_of(folder).is_unchanged(path.name for path in paths)


def _scan_of(folder: Path) -> FolderScan:
    key = str(absolute(folder)), os.fspath(folder)
    scan = _SCANS.pop(key, None) or FolderScan(folder)
    _SCANS[key] = scan
    while len(_SCANS) > _MAX_FOLDERS:
        del _SCANS[next(iter(_SCANS))]
    return scan


@final
class FolderScan:
    """The checkpoints of a folder, as they were found last.

    Args:
        folder: the folder, which may not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, _Known] = {}
        # The checkpoints that the last inspection read, including those that must be read again.
        self._just_read: set[str] = set()

    def inspect(self, look_up: Collection[str] | None = None) -> list[CheckpointInfo]:
        """Return the metadata of all checkpoints; ``look_up`` limits the look-ups of known ones to these names."""
        try:
            names = os.listdir(self._folder)  # noqa: PTH208 -- creating a Path for each name would take as long as all else
        except (FileNotFoundError, NotADirectoryError):
            names = []
        if look_up is None:
            self._forget_changed(self._known)
        else:
            self._forget_changed(self._known.keys() & look_up)
        listed = set(names)
        if not listed.issuperset(self._known):
            self._known = {name: known for name, known in self._known.items() if name in listed}
        found = [known.info for known in self._known.values()]
        self._just_read.clear()
        for name in sorted(listed.difference(self._known)):
            if not name.startswith("."):
                info = self._read(name)
                if info is not None:
                    found.append(info)
                    self._just_read.add(name)
        return found

    def is_unchanged(self, names: Iterable[str]) -> bool:
        """Return whether all of these checkpoints have not changed since the last inspection; forget those that have."""
        wanted = set(names) - self._just_read
        self._forget_changed(self._known.keys() & wanted)
        return wanted <= self._known.keys()

    def _forget_changed(self, names: Iterable[str]) -> None:
        changed: list[str] = []
        look_at = os.stat
        # This may run for every checkpoint at every save, so it is written without function calls.
        for name in names:
            known = self._known[name]
            try:
                now = look_at(known.file)
            except OSError:
                changed.append(name)
                continue
            if (now.st_ctime_ns, now.st_ino, now.st_size) != known.signature:
                changed.append(name)
        for name in changed:
            del self._known[name]

    def _read(self, name: str) -> CheckpointInfo | None:
        """Read the metadata of a checkpoint, and remember it if it need not be read again."""
        path = self._folder / name
        # Look at the file before reading it, so that a change in the meantime changes the signature.
        file = path / MANIFEST
        signature = _signature(file)
        if signature is None:
            file, signature = path, _signature(path)
        now = time.time_ns()
        info = inspect_checkpoint(path)
        if info is None or signature is None or (info.fault and info.finite) or _may_change_unnoticed(signature, now):
            return info
        self._known[name] = _Known(os.fspath(file), signature, info)
        return info


@final
@dataclass(frozen=True, slots=True)
class _Known:
    """A checkpoint that was read.

    Attributes:
        file: the path of the file with its metadata.
        signature: identifies the contents of this file.
        info: the metadata.
    """

    file: str
    signature: tuple[int, int, int]
    info: CheckpointInfo


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return numbers that change if a regular file is replaced or written; None if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    # Unlike the time of the last modification, the time of the last change cannot be set.
    return (found.st_ctime_ns, found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else None


def _may_change_unnoticed(signature: tuple[int, int, int], now: int) -> bool:
    """Return whether a write that follows may leave the signature unchanged, because the last one is too recent."""
    changed = signature[0]
    resolution = _COARSE_RESOLUTION_NS if changed % 1_000_000_000 == 0 else _RESOLUTION_NS
    return abs(now - changed) < resolution


_LOCK: Final = threading.Lock()
_SCANS: Final[dict[tuple[str, str], FolderScan]] = {}
