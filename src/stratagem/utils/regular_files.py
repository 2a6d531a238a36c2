"""Open only regular files, so that no symbolic link, pipe or device in a shared directory redirects or blocks the process."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["open_regular", "read_regular"]

# Windows has neither flag, nor pipes and devices in directories. Without O_NONBLOCK, opening a pipe waits for its other end.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o666, *, follow: bool = False) -> int:
    """Return the descriptor of a regular file, like ``os.open``. It can be the ``opener`` of the built-in ``open``.

    Args:
        path: the file.
        flags: the flags of ``os.open``.
        mode: the permissions of a new file.
        follow: whether ``path`` may be a symbolic link to a regular file.

    Raises:
        OSError: if the path is something other than a regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | _NONBLOCK | (0 if follow else _NOFOLLOW), mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR, errno.EOPNOTSUPP):
            raise _not_regular(path, os.lstat(path).st_mode) from error
        raise
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise _not_regular(path, kind)
    return descriptor


def read_regular(path: Path) -> bytes:
    """Return the contents of a regular file or of a link to one.

    Raises:
        OSError: if the path is something else, or cannot be read.
    """
    binary = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(open_regular(path, os.O_RDONLY | binary, follow=True), "rb") as file:
        return file.read()


def _not_regular(path: str | os.PathLike[str], mode: int) -> OSError:
    kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
    return OSError(errno.EINVAL, f"it is {kind}, and a regular file is required; remove it", os.fspath(path))
