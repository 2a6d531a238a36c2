"""Read, write, sync and remove local files, so that synced data survives a power loss.

On macOS, ``fsync`` passes the data to the drive but does not flush the drive's cache.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stratagem.storage import operations
from stratagem.utils.regular_files import read_regular

__all__ = [
    "begin_writeback",
    "fsync_directory",
    "fsync_file",
    "fsync_tree",
    "is_same_file",
    "closing_descriptor",
    "open_for_reading",
    "read_at",
    "read_bytes",
    "remove",
    "tree_bytes",
    "write_bytes",
    "write_fully",
]

# Some network and user-space file systems cannot sync a directory.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
# Used on platforms that cannot read at an offset without changing the file position, which threads share.


def read_bytes(path: Path) -> bytes:
    """Return the contents of a regular file or of a link to one; raise an error for a named pipe instead of waiting for it."""
    return read_regular(path)


def open_for_reading(path: Path) -> int:
    """Open an existing file; return a descriptor for reading."""
    return os.open(path, os.O_RDONLY | operations.OPEN_FLAGS)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read from ``offset`` into a buffer; return the number of bytes read, which may be smaller at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with operations.POSITION_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_bytes(path: Path, data: bytes) -> None:
    """Create or overwrite a file in place and sync it.

    If the process is killed, the file may be incomplete; use ``write_atomic`` where that matters.
    """
    descriptor = operations.open_file(path) if os.path.lexists(path) else operations.create_file(path)
    with closing_descriptor(descriptor):
        write_fully(descriptor, data, 0)
        operations.truncate(descriptor, len(data))
        operations.fsync(descriptor)


def write_fully(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in as many calls as the system needs."""
    remaining = memoryview(data)
    while remaining:
        count = operations.write(descriptor, remaining, offset)
        remaining, offset = remaining[count:], offset + count


def begin_writeback(descriptor: int) -> None:
    """Ask the system to start writing cached data to the disk, without waiting. The data may then be evicted from the cache.

    Do nothing if the system does not support this.
    """
    if hasattr(os, "posix_fadvise"):
        # This is only a hint; if it fails, the system writes the data later.
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def closing_descriptor(descriptor: int) -> Iterator[int]:
    """Close the descriptor when the context exits, even on an exception."""
    try:
        yield descriptor
    finally:
        operations.close(descriptor)


def fsync_file(path: Path) -> None:
    """Sync the contents of a file to the disk."""
    with closing_descriptor(operations.open_folder(path)) as descriptor:
        operations.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Sync the entries of a directory to the disk; do nothing if the file system does not support it."""
    if sys.platform == "win32":  # Windows cannot open a directory and has no call to sync its entries.
        return
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def fsync_tree(path: Path) -> None:
    """Sync a directory and everything below it to the disk; symbolic links are not followed."""
    for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                fsync_file(file)
        fsync_directory(Path(folder))


def remove(path: Path) -> None:
    """Remove a file, a symbolic link or a directory tree; do nothing if the path does not exist."""
    if not path.is_dir() or path.is_symlink():
        operations.remove_file(path)
        return
    for inner in path.iterdir():
        remove(inner)
    operations.remove_folder(path)


def tree_bytes(path: Path) -> int:
    """Return the size in bytes of a file or of all files in a directory; 0 if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        return sum(tree_bytes(inner) for inner in path.iterdir())
    return path.lstat().st_size if path.exists() else 0


def _raise(error: OSError) -> None:
    raise error


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still refers to the file that was opened; False if it cannot be inspected."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
