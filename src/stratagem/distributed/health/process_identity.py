"""Tell one process of this machine from all others, and whether it still runs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

__all__ = ["ProcessIdentity"]


@final
@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The process of a rank. ``place`` tells where its number means that process; ``started`` tells it from a later one."""

    pid: int
    pid_namespace: str
    start_time: str

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        return cls.of(os.getpid())

    @classmethod
    def of_parent(cls) -> Self:
        """Return the process that started this one."""
        return cls.of(os.getppid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the process of a number on this machine."""
        return cls(pid, _pid_namespace(), _stat_of(pid)[1])

    def has_ended(self) -> bool:
        """Tell whether the process has ended for sure: False for one on another machine, or in another container."""
        if self.pid_namespace != _pid_namespace():
            return False
        state, start_time = _stat_of(self.pid)
        return start_time != self.start_time or state in "ZX"


def _pid_namespace() -> str:
    """Name the space of process numbers that this process lives in."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname()


def _stat_of(pid: int) -> tuple[str, str]:
    """Return the state and the start time of a process; a dead one has none.

    The fields are described in https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return "X", ""
        return _state_without_proc(pid), ""
    return fields[0], fields[19]


def _state_without_proc(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "X"
    except PermissionError:
        pass
    return "R"
