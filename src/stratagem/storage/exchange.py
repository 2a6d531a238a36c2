"""Swap two names of a directory in one step, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD = -100  # relative paths start at the working directory; from linux/fcntl.h
_RENAME_EXCHANGE = 2  # from linux/fs.h
# The kernel, the C library, a sandbox or the file system does not know the call.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


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
