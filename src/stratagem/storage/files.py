"""Read, write, sync and remove local files, so that what is said to be stored survives a power loss.

On macOS ``fsync`` hands the data to the drive but does not empty the drive's own cache.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stratagem.storage import operations

__all__ = [
    "begin_writeback",
    "fsync_directory",
    "fsync_file",
    "fsync_tree",
    "opened",
    "read_bytes",
    "remove",
    "tree_bytes",
    "write_bytes",
    "write_fully",
]

# Some network and user-space file systems cannot sync a directory; they publish a name at once or not at all.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def read_bytes(path: Path) -> bytes:
    """Return what the file holds."""
    return path.read_bytes()


def write_bytes(path: Path, data: bytes) -> None:
    """Create or overwrite a file in place, and wait until its content is on the disk.

    A kill leaves it half written; ``write_atomic`` is what the rest of the package uses.
    """
    descriptor = operations.open_file(path) if path.exists() else operations.create_file(path)
    with opened(descriptor):
        write_fully(descriptor, data, 0)
        operations.truncate(descriptor, len(data))
        operations.fsync(descriptor)


def write_fully(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data from ``offset`` on; the system may take it in pieces."""
    rest = memoryview(data)
    while rest:
        count = operations.write(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def begin_writeback(descriptor: int) -> None:
    """Have the system bring to the disk what was written so far, without a wait; it may keep none of it in memory.

    Nothing happens where the system has no such call.
    """
    if hasattr(os, "posix_fadvise"):
        # Advice only: a file system that refuses it writes as late as it would have.
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    """Give the descriptor back at the end of the block, also where it fails."""
    try:
        yield descriptor
    finally:
        operations.close(descriptor)


def fsync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with opened(operations.open_folder(path)) as descriptor:
        operations.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk; nothing happens where the file system cannot."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def fsync_tree(path: Path) -> None:
    """Wait until a directory and all below it are on the disk; links are not followed."""
    for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                fsync_file(file)
        fsync_directory(Path(folder))


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a directory with all below it; a missing one is fine."""
    if not path.is_dir() or path.is_symlink():
        operations.remove_file(path)
        return
    for inner in path.iterdir():
        remove(inner)
    operations.remove_folder(path)


def tree_bytes(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a directory; 0 where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        return sum(tree_bytes(inner) for inner in path.iterdir())
    return path.lstat().st_size if path.exists() else 0


def _raise(error: OSError) -> None:
    raise error
