"""All primitive changes that this package makes to a file system.

Other modules call them as ``operations.write(...)``, so that tests can replace them: to kill the process before, during or
after any operation, to make one fail, or to record them and simulate a power loss.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from pathlib import Path

from stratagem.utils.regular_files import open_regular

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

_AT_FDCWD = -100  # Relative paths start at the working directory; from linux/fcntl.h.
# Windows has no O_CLOEXEC, because its descriptors are not inherited, and translates line ends without O_BINARY.
OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# Used on platforms that cannot write at an offset without changing the file position, which threads share.
POSITION_LOCK = threading.Lock()
_RENAME_EXCHANGE = 2  # from linux/fs.h
# The kernel, the C library, a sandbox or the file system does not support the call.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def create_folder(path: Path) -> None:
    """Create a folder, which must not exist yet."""
    path.mkdir()


def create_file(path: Path) -> int:
    """Create an empty file, which must not exist yet; return a descriptor for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, 0o666)


def open_file(path: Path) -> int:
    """Open an existing regular file; return a descriptor for reading and writing. Symbolic links are not followed."""
    return open_regular(path, os.O_RDWR | OPEN_FLAGS)


def open_folder(path: Path) -> int:
    """Open a folder or file; return a descriptor for syncing it."""
    # Windows can only sync files that are opened for writing.
    return os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | OPEN_FLAGS)


def write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write data at ``offset``; return the number of bytes written, which may be less than the length of the data."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with POSITION_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def truncate(descriptor: int, size: int) -> None:
    """Set the size of a file; added bytes are zeros."""
    os.ftruncate(descriptor, size)


def fsync(descriptor: int) -> None:
    """Sync a file or folder to the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder atomically, replacing an existing file."""
    old.replace(new)


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing paths on one file system atomically, with Linux's ``renameat2``.

    See https://man7.org/linux/man-pages/man2/renameat2.2.html.

    Returns:
        False, with nothing changed, if the system or the file system does not support it.

    Raises:
        OSError: if it is supported but fails.
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
    """Remove a file or symbolic link; do nothing if it does not exist."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()
