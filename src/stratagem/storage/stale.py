"""Clean up what killed processes left beside the files that they were writing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.storage import operations
from stratagem.storage.files import fsync_directory, remove
from stratagem.storage.temporary import TemporaryName

__all__ = ["CleanupResult", "clean_temporaries"]

_CLOCK_SLACK_S = 2.0  # the start time of a process is known to ticks, that of a file to the clock of its file system


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupResult:
    """What ``clean_temporaries`` removed, and the paths whose old content it put back."""

    removed: tuple[Path, ...]
    restored: tuple[Path, ...]


def clean_temporaries(parent: Path) -> CleanupResult:
    """Remove what killed processes left in a directory, and put back old content whose replacement never came.

    Only names made by this package are touched, and not those of processes that are alive on this machine. Those of
    other machines cannot be told from dead ones: call it where one run owns the directory.

    Raises:
        OSError: if something stale cannot be removed.
    """
    stale = [(path, name) for path in parent.iterdir() if (name := TemporaryName.parse(path)) and _is_stale(path, name)]
    # Newest first: of several old ones the last that was published is put back.
    stale.sort(key=lambda item: item[0].lstat().st_mtime_ns, reverse=True)
    removed, restored = [], []
    for path, name in stale:
        if name.set_aside and not name.target.exists():
            operations.rename(path, name.target)
            restored.append(name.target)
        else:
            remove(path)
            removed.append(path)
    if stale:
        fsync_directory(parent)
    return CleanupResult(removed=tuple(removed), restored=tuple(restored))


def _is_stale(path: Path, name: TemporaryName) -> bool:
    if not _is_alive(name.pid):
        return True
    # In containers a restarted process often has the number of the killed one: then the file is older than it.
    # The change time counts, since renaming sets it: what was set aside may have been written long before.
    started = _start_time(name.pid)
    return started is not None and path.lstat().st_ctime < started - _CLOCK_SLACK_S


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _start_time(pid: int) -> float | None:
    """Return when a process started, in seconds since the epoch, or None where the platform has no /proc.

    The fields are described in https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - uptime + int(after_name[19]) / os.sysconf("SC_CLK_TCK")
