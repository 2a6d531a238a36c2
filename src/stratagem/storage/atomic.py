"""Publish files and directories whole: whoever looks finds the old content or the new, never a part of one.

New content is written under a temporary name in the same directory (in another one, moving it could be a copy),
every file of it is synced, then its directory, then one rename publishes it, then the parent directory is synced.
What a kill leaves at each point:

============================================  =====================  ==========================================
killed                                        under the path         beside it, for ``clean_temporaries``
============================================  =====================  ==========================================
while the new content is written or synced    the old, or nothing    a part of the new
after the rename                              the new                nothing, or the old of a directory
replacing a directory without ``renameat2``:
between its two renames                       nothing                the old, which is put back, and the new
============================================  =====================  ==========================================
"""

from __future__ import annotations

import errno
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

__all__ = ["atomic_directory", "atomic_file", "write_atomic"]

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Create or replace a file with the data (text as UTF-8), durably and in one step.

    A symbolic link at ``path`` is replaced, not followed.

    Raises:
        WorkDirError: if nothing can be created in the parent directory.
        OSError: if writing failed otherwise; a note says what was being written. The old content is untouched.
    """
    with atomic_file(path) as temporary:
        write_bytes(temporary, data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary file to write to; it becomes ``path`` when the block ends without an exception.

    On an exception it is removed and the old content is untouched. A symbolic link at ``path`` is replaced.

    Raises:
        WorkDirError: if nothing can be created in the parent directory.
        OSError: if it cannot be published; a note says what was being written.
    """
    target = absolute(path)
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "There is a directory where a file shall be written", str(target))
    with _temporary(target, _create_file) as temporary:
        yield temporary
        fsync_file(temporary)
        operations.rename(temporary, target)
    _make_durable(target)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary directory to fill; it becomes ``path`` when the block ends without an exception.

    On an exception it is removed and the old directory is untouched. An old directory is replaced as a whole: on
    Linux in one step, elsewhere by moving it aside first, from where ``clean_temporaries`` puts it back if the new
    one never came.

    Raises:
        WorkDirError: if nothing can be created in the parent directory.
        OSError: if it cannot be published; a note says what was being written.
    """
    target = absolute(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "There is a file where a directory shall be written", str(target))
    with _temporary(target, operations.create_folder) as temporary:
        yield temporary
        fsync_tree(temporary)
        old = _publish_directory(temporary, target)
    _make_durable(target)
    if old is not None:
        with suppress(OSError):  # the new content is safe; clean_temporaries removes what is left of the old
            remove(old)


@contextmanager
def _temporary(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Make a temporary sibling; remove it on an exception, and say in every OSError what was being written."""
    temporary = temporary_path(target)
    try:
        create(temporary)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            error.add_note(_describe(target, temporary))
            raise
        raise WorkDirError(
            f"{target.parent}: cannot create {target.name} there ({error.strerror}). "
            "Make the directory, free it for writing, or choose another one."
        ) from error
    try:
        yield temporary
    except BaseException as error:
        if isinstance(error, OSError):
            error.add_note(_describe(target, temporary))
        try:
            remove(temporary)
        except OSError as left:
            error.add_note(f"{temporary} could not be removed ({left}); clean_temporaries does it later.")
        raise


def _create_file(path: Path) -> None:
    descriptor = operations.create_file(path)
    try:
        operations.close(descriptor)
    except OSError:
        remove(path)
        raise


def _publish_directory(temporary: Path, target: Path) -> Path | None:
    """Rename ``temporary`` to ``target``, and return where the content that it replaced is now, if there was any."""
    if not target.exists() and not target.is_symlink():
        operations.rename(temporary, target)
        return None
    if operations.exchange(temporary, target):
        return temporary
    aside = old_content_path(target)
    operations.rename(target, aside)
    try:
        operations.rename(temporary, target)
    except BaseException:
        operations.rename(aside, target)
        raise
    return aside


def _make_durable(target: Path) -> None:
    try:
        fsync_directory(target.parent)
    except OSError as error:
        error.add_note(f"{target} is in place and complete, but a power loss may bring back what was there before.")
        raise


def _describe(target: Path, temporary: Path) -> str:
    written, free = "an unknown number of", "an unknown number of"
    with suppress(OSError):  # this text must not hide the error that it describes
        written = str(tree_bytes(temporary))
        free = str(shutil.disk_usage(target.parent).free)
    return f"While writing {target}: {written} bytes were written, {free} bytes are free there."
