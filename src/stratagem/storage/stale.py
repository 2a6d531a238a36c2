"""Remove temporary files that killed processes left behind."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.storage import operations
from stratagem.storage.files import fsync_directory, remove
from stratagem.storage.temporary import TemporaryName
from stratagem.utils.processes import process_exists, read_process_stat

__all__ = ["CleanupResult", "clean_temporaries"]

# Start times of processes are in clock ticks, and the resolution of file times depends on the file system.
_CLOCK_SLACK_S = 2.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupResult:
    """The paths that ``clean_temporaries`` removed, and those whose old contents it restored."""

    removed: tuple[Path, ...]
    restored: tuple[Path, ...]


def clean_temporaries(parent: Path) -> CleanupResult:
    """Remove temporary files that killed processes left in a directory, and restore replaced contents.

    Old contents are restored if the new contents were not published.

    Only temporary names made by this package are touched, except those of processes that are alive on this machine.
    Processes on other machines cannot be checked and are treated as dead, so call this only if a single run uses the
    directory.

    Raises:
        OSError: if a stale path cannot be removed.
    """
    stale = [(path, name) for path in parent.iterdir() if (name := TemporaryName.parse(path)) and _is_stale(path, name)]
    # Sort the newest first, so that the version that was published last is restored.
    stale.sort(key=lambda item: item[0].lstat().st_mtime_ns, reverse=True)
    removed, restored = [], []
    for path, name in stale:
        if name.is_old_content and not name.target.exists():
            operations.rename(path, name.target)
            restored.append(name.target)
        else:
            remove(path)
            removed.append(path)
    if stale:
        fsync_directory(parent)
    return CleanupResult(removed=tuple(removed), restored=tuple(restored))


def _is_stale(path: Path, name: TemporaryName) -> bool:
    if not process_exists(name.pid):
        return True
    # In containers, a restarted process often reuses a process ID. In that case, the file is older than the process.
    # Compare the change time, which a rename sets; old contents may have been written long before.
    started = _start_time(name.pid)
    return started is not None and path.lstat().st_ctime < started - _CLOCK_SLACK_S


def _start_time(pid: int) -> float | None:
    """Return the start time of a process in seconds since the epoch, or None if the platform has no /proc."""
    try:
        start_time = read_process_stat(pid)[1]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - uptime + int(start_time) / os.sysconf("SC_CLK_TCK")
