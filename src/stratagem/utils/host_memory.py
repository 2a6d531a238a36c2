"""The host memory of this process and of the container that it runs in."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

with suppress(ImportError):  # Windows has no resource limits.
    import resource

__all__ = ["HostMemory", "host_memory"]

_PROC: Final = "/proc"
_CGROUPS: Final = "/sys/fs/cgroup"
_RESIDENT: Final = re.compile(r"^VmRSS:\s*(\d+) kB", re.MULTILINE)
_PEAK: Final = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)
_CACHE: Final = re.compile(r"^inactive_file (\d+)", re.MULTILINE)
_CACHE_OF_SUBGROUPS: Final = re.compile(r"^total_inactive_file (\d+)", re.MULTILINE)
_KIB: Final = 1024
# Version 1 of control groups writes this or a similar number if there is no limit.
_UNLIMITED: Final = 1 << 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Host memory in bytes.

    Attributes:
        resident: the physical memory that this process uses now; None if the system does not report it.
        peak: the largest value of ``resident`` since the process started; None if the system does not report it.
        limit: the limit of the control group (container or job) of this process; None if it has none.
        used: the memory of all processes in this control group that cannot be reclaimed, so without the page cache; None if
            there is no limit.
    """

    resident: int | None
    peak: int | None
    limit: int | None = None
    used: int | None = None

    @property
    def used_share(self) -> float | None:
        """The used part of the limit; None if there is none."""
        return None if self.limit is None or self.used is None else self.used / self.limit


def host_memory(proc: str = _PROC, cgroups: str = _CGROUPS) -> HostMemory:
    """Return the current host memory. On Linux, this reads one small file, and three more if there is a limit.

    Args:
        proc: where the proc file system is mounted.
        cgroups: where the control groups are mounted.
    """
    status = _text(f"{proc}/self/status")
    resident, peak = (_found(pattern, status) for pattern in (_RESIDENT, _PEAK))
    files = _limited_group(proc, cgroups)
    limit, used = (None, None) if files is None else _limit_and_use(files)
    return HostMemory(
        resident=None if resident is None else resident * _KIB,
        peak=_own_peak() if peak is None else peak * _KIB,
        limit=limit,
        used=used,
    )


def _own_peak() -> int | None:
    if "resource" not in globals():
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


@final
@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """The files of a control group that contain the limit, the used memory and the statistics."""

    limit: str
    used: str
    statistics: str


def _limit_and_use(files: _GroupFiles) -> tuple[int | None, int | None]:
    limit, used = _number(files.limit), _number(files.used)
    if limit is None or used is None:
        return None, None
    # Files in the page cache that no process has used recently are dropped before processes are killed.
    statistics = _text(files.statistics)
    cache = _found(_CACHE_OF_SUBGROUPS, statistics) or _found(_CACHE, statistics) or 0
    return limit, max(0, used - cache)


@functools.cache
def _limited_group(proc: str, cgroups: str) -> _GroupFiles | None:
    """Return the innermost control group of this process that has a limit; None if there is none."""
    for files in _groups(proc, cgroups):
        limit, used = _number(files.limit), _number(files.used)
        if limit is not None and used is not None and limit < _UNLIMITED:
            return files
    return None


def _groups(proc: str, cgroups: str) -> Iterator[_GroupFiles]:
    """Yield the memory control groups of this process from the innermost one."""
    for line in _text(f"{proc}/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            root, names = Path(cgroups), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path(cgroups, "memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container, the path may be that of the host, and the group of the container is mounted at the root.
        inner = root / path.strip("/")
        for folder in (inner, *inner.parents):
            limit, used = (str(folder / name) for name in names)
            yield _GroupFiles(limit, used, str(folder / "memory.stat"))
            if folder == root:
                break


def _found(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else int(found[1])


def _number(file: str) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: str) -> str:
    try:
        with open(file, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 -- fewer calls
            return stream.read()
    except OSError:
        return ""
