"""Identify a process on this machine uniquely, and check whether it is still running."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from stratagem.utils.processes import child_processes, is_stopped, process_exists, read_process_stat

__all__ = ["ProcessIdentity"]


@final
@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The identity of a rank's process.

    Attributes:
        pid: the process ID.
        pid_namespace: the boot and the PID namespace in which ``pid`` is valid.
        start_time: the start time of the process, which distinguishes it from a later process with the same ID.
    """

    pid: int
    pid_namespace: str
    start_time: str

    @classmethod
    def here(cls) -> Self:
        """Return the identity of this process."""
        return cls.of(os.getpid())

    @classmethod
    def of_parent(cls) -> Self:
        """Return the identity of the parent process."""
        return cls.of(os.getppid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the identity of a process on this machine."""
        return cls(pid, _pid_namespace(), _stat_of(pid)[1])

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; False for processes on other machines or in other containers."""
        return self._state() == "X"

    def is_stopped(self) -> bool:
        """Return whether the process is known to be stopped by a signal or a debugger, and has not ended."""
        return self._state() in ("T", "t")

    def is_uninterruptible(self) -> bool:
        """Return whether the process is known to wait in the kernel in a way that no signal interrupts."""
        return self._state() == "D"

    def stopped_children(self) -> list[int]:
        """Return the IDs of the child processes that are known to be stopped by a signal or a debugger."""
        if self._state() in ("", "X"):
            return []
        return [pid for pid in child_processes(self.pid) if is_stopped(pid)]

    def _state(self) -> str:
        """Return the state of the process as in /proc, "X" if it has ended; empty if it belongs to another PID namespace."""
        if self.pid_namespace != _pid_namespace():
            return ""
        state, start_time = _stat_of(self.pid)
        return "X" if start_time != self.start_time or state == "Z" else state


def _pid_namespace() -> str:
    """Return an identifier of the current boot and the PID namespace of this process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname()


def _stat_of(pid: int) -> tuple[str, str]:
    """Return the state and the start time of a process; the start time of an ended process is empty."""
    try:
        return read_process_stat(pid)
    except OSError:
        if Path("/proc/self/stat").exists():
            return "X", ""
        return "R" if process_exists(pid) else "X", ""
