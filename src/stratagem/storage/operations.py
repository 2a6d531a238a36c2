"""Every change that this package makes to a file system, one function for each kind.

All other modules call them as ``operations.write(...)``, so that a test can stand between: it kills the process before,
half-way through or after any of them, lets any fail, or records them to play a power loss.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

__all__ = [
    "close",
    "create_file",
    "create_folder",
    "exchange",
    "fsync",
    "open_file",
    "open_folder",
    "remove_file",
    "remove_folder",
    "rename",
    "truncate",
    "write",
]

_AT_FDCWD = -100  # relative paths start at the working directory; from linux/fcntl.h
_RENAME_EXCHANGE = 2  # from linux/fs.h
# The kernel, the C library, a sandbox or the file system does not know the call.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def create_folder(path: Path) -> None:
    """Make a folder that was not there."""
    path.mkdir()


def create_file(path: Path) -> int:
    """Make an empty file that was not there; return a descriptor to write with."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def open_file(path: Path) -> int:
    """Return a descriptor to write into a file that is there."""
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def open_folder(path: Path) -> int:
    """Return a descriptor of a folder, or a file, to sync it by."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write some of the data from ``offset`` on, most often all; return how many bytes."""
    return os.pwrite(descriptor, data, offset)


def truncate(descriptor: int, size: int) -> None:
    """Give a file its size; what was not written reads as zeros."""
    os.ftruncate(descriptor, size)


def fsync(descriptor: int) -> None:
    """Wait until what the descriptor stands for is on the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name in one step; a file that has it is replaced."""
    old.replace(new)


def exchange(first: Path, second: Path) -> bool:
    """Swap what two existing names on one file system stand for; at every moment both exist.

    Uses ``renameat2`` of Linux (https://man7.org/linux/man-pages/man2/renameat2.2.html).

    Returns:
        False, with nothing changed, where the system or the file system has no such operation.

    Raises:
        OSError: if it exists but failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    flag = ctypes.c_uint(_RENAME_EXCHANGE)
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def remove_file(path: Path) -> None:
    """Take a file's or link's name away; a missing one is fine."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Take an empty folder away."""
    path.rmdir()
