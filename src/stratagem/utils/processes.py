"""Look up processes on this machine, and the cores that they may use."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["child_processes", "continue_stopped", "is_stopped", "process_exists", "read_process_stat", "usable_cores"]

_SYNCHRONIZE = 0x00100000  # from winnt.h
_ERROR_INVALID_PARAMETER = 87  # from winerror.h; OpenProcess fails with it if there is no such process
_WAIT_OBJECT_0 = 0  # from winbase.h; a process is signaled once it has exited


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_exists(pid: int) -> bool:
    """Return whether a process with this ID exists; True if this cannot be checked."""
    if sys.platform == "win32":
        # On Windows, os.kill(pid, 0) would send Ctrl-C to the process.
        return _exists_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def read_process_stat(pid: int) -> tuple[str, str]:
    """Return the state of a process, and its start time in clock ticks since the system booted.

    See https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html for the fields.

    Raises:
        OSError: if there is no such process, or the platform has no /proc.
    """
    # The name of the program, in parentheses, may contain spaces and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def is_stopped(pid: int) -> bool:
    """Return whether a process is known to be stopped by a signal or a debugger."""
    try:
        return read_process_stat(pid)[0] in "Tt"
    except OSError:
        return False


def child_processes(pid: int) -> list[int]:
    """Return the IDs of the child processes of a process; empty if the platform does not list them in /proc."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end at any time.
            with suppress(OSError):
                children += map(int, (thread / "children").read_text().split())
    return children


def continue_stopped(pids: Iterable[int]) -> None:
    """Send SIGCONT to the processes that are stopped."""
    for pid in pids:
        if is_stopped(pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGCONT)


def _exists_on_windows(pid: int) -> bool:
    """Return whether a process is running.

    See https://learn.microsoft.com/windows/win32/api/processthreadsapi/nf-processthreadsapi-openprocess.
    """
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]  # only on Windows
    kernel32.OpenProcess.restype = ctypes.c_void_p
    kernel32.WaitForSingleObject.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    kernel32.CloseHandle.argtypes = (ctypes.c_void_p,)
    handle = kernel32.OpenProcess(_SYNCHRONIZE, False, ctypes.c_uint32(pid))
    if not handle:
        return bool(ctypes.get_last_error() != _ERROR_INVALID_PARAMETER)  # type: ignore[attr-defined]  # only on Windows
    try:
        return bool(kernel32.WaitForSingleObject(handle, 0) != _WAIT_OBJECT_0)
    finally:
        kernel32.CloseHandle(handle)
