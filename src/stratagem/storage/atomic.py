"""Publish files and directories atomically: readers see either the old or the new contents, never a mixture.

New contents are written under a temporary name in the same directory, because a move between directories may be a copy.
All files and directories are synced, one rename publishes them, and the parent directory is synced. If the process is
killed, it leaves:

==============================================  =====================  ========================================
killed                                          at the path            left for ``clean_temporaries``
==============================================  =====================  ========================================
while the new contents are written or synced    the old, or nothing    a part of the new contents
after the rename                                the new                nothing, or the old directory
between the two renames that replace a          nothing                the old directory, which is restored,
directory without ``renameat2``                                        and the new one
==============================================  =====================  ========================================
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stratagem.errors import WorkDirError
from stratagem.storage import operations
from stratagem.storage.files import fsync_directory, fsync_file, fsync_tree, remove, tree_bytes, write_bytes
from stratagem.storage.temporary import old_content_path, temporary_path
from stratagem.utils import absolute

__all__ = ["atomic_directory", "atomic_file", "write_atomic", "write_record"]

# Another process has created the target directory in the meantime.
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Create or replace a file durably and atomically; text is encoded as UTF-8.

    A symbolic link at ``path`` is replaced, not followed.

    Raises:
        WorkDirError: if no file can be created in the parent directory.
        OSError: if writing fails for another reason; a note names the target. The old contents are unchanged.
    """
    with atomic_file(path) as temporary:
        write_bytes(temporary, data.encode() if isinstance(data, str) else data)


def write_record(path: str | os.PathLike[str], data: bytes | str, logger: logging.Logger) -> bool:
    """Like :func:`write_atomic`, for a file that a run can do without: if it cannot be written, only log a warning.

    Returns:
        Whether the file was written.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        logger.warning("%s was not written: %s. The run does not depend on it.", path, error.strerror or error)
        return False
    return True


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file to write to; it becomes ``path`` when the context exits without an exception.

    On an exception, the temporary file is removed and the old contents are unchanged. A symbolic link at ``path`` is replaced.

    Raises:
        WorkDirError: if no file can be created in the parent directory.
        OSError: if the file cannot be published; a note names the target.
    """
    target = absolute(path)
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "Cannot write a file where a directory exists", str(target))
    with _temporary(target, _create_file) as temporary:
        yield temporary
        fsync_file(temporary)
        operations.rename(temporary, target)
    _make_durable(target)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary directory to fill; it becomes ``path`` when the context exits without an exception.

    On an exception, the temporary directory is removed and the old directory is unchanged. An existing directory is
    replaced as a whole: on Linux in one step; elsewhere the old directory is first renamed, and ``clean_temporaries``
    restores it if the process is killed before the new directory is in place.

    Raises:
        WorkDirError: if no directory can be created in the parent directory.
        OSError: if the directory cannot be published; a note names the target.
    """
    target = absolute(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Cannot write a directory where a file exists", str(target))
    with _temporary(target, operations.create_folder) as temporary:
        yield temporary
        fsync_tree(temporary)
        old = _publish_directory(temporary, target)
    _make_durable(target)
    if old is not None:
        # The new contents are published; clean_temporaries() removes the remaining old contents.
        with suppress(OSError):
            remove(old)


@contextmanager
def _temporary(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create a temporary sibling of ``target``; on an exception, remove it and add a note to every OSError."""
    temporary = temporary_path(target)
    try:
        create(temporary)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            error.add_note(_describe(target, temporary))
            raise
        raise WorkDirError(
            f"{target.parent}: cannot create {target.name} in this directory ({error.strerror}). Create the directory, make it "
            "writable, or choose a different directory."
        ) from error
    try:
        yield temporary
    except BaseException as error:
        if isinstance(error, OSError):
            error.add_note(_describe(target, temporary))
        try:
            remove(temporary)
        except OSError as failure:
            error.add_note(f"Could not remove {temporary} ({failure}); clean_temporaries() will remove it.")
        raise


def _create_file(path: Path) -> None:
    descriptor = operations.create_file(path)
    try:
        operations.close(descriptor)
    except OSError:
        remove(path)
        raise


def _publish_directory(temporary: Path, target: Path) -> Path | None:
    """Rename ``temporary`` to ``target``; return the new path of the directory that it replaced, or None."""
    if not target.exists() and not target.is_symlink():
        try:
            operations.rename(temporary, target)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        else:
            return None
    if operations.exchange(temporary, target):
        return temporary
    old = old_content_path(target)
    operations.rename(target, old)
    try:
        operations.rename(temporary, target)
    except BaseException:
        operations.rename(old, target)
        raise
    return old


def _make_durable(target: Path) -> None:
    try:
        fsync_directory(target.parent)
    except OSError as error:
        error.add_note(
            f"{target} was published, but could not be synced. After a power loss, the previous contents may reappear."
        )
        raise


def _describe(target: Path, temporary: Path) -> str:
    written, free = "an unknown number of", "an unknown number of"
    with suppress(OSError):  # A failure in this function must not hide the original error.
        written = str(tree_bytes(temporary))
        free = str(shutil.disk_usage(target.parent).free)
    return f"While writing {target}: {written} bytes were written, {free} bytes are free."
