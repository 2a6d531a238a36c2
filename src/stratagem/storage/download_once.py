"""Let one process of a machine download a file while the others wait for its copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stratagem.storage import operations
from stratagem.storage.files import is_same_file

try:
    import fcntl
except ImportError:  # Windows
    _HAS_FCNTL = False
else:
    _HAS_FCNTL = True

__all__ = ["download_once"]


def download_once(copy: Path, is_complete: Callable[[], bool], download: Callable[[], None]) -> None:
    """Call ``download`` unless there is a complete ``copy``. Of several processes that share a cache, one downloads.

    The other processes wait, and then check its copy. If the download failed, the next process tries it. Without file locks,
    all processes download; each publishes its copy atomically.

    Args:
        copy: the path at which the copy is published; the lock file is created next to it.
        is_complete: whether the copy exists and is valid.
        download: publish the copy atomically.
    """
    while not is_complete():
        with _lock(copy.with_name(f".{copy.name}.lock")) as has_waited:
            if not has_waited:
                download()
                return


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a file lock; yield whether this process had to wait for another one, which has finished by then."""
    descriptor = _open(path)
    try:
        # If the file is gone, another process finished between opening and locking it.
        has_waited = _acquire(descriptor) or not is_same_file(descriptor, path)
        try:
            yield has_waited
        finally:
            if not has_waited:  # Otherwise, the file may already belong to another process.
                with suppress(OSError):
                    path.unlink(missing_ok=True)
    finally:
        operations.close(descriptor)


def _open(path: Path) -> int:
    while True:
        try:
            return operations.create_file(path)
        except FileExistsError:
            with suppress(FileNotFoundError):  # It was removed in the meantime, so try again.
                return operations.open_file(path)


def _acquire(descriptor: int) -> bool:
    if not _HAS_FCNTL:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError:  # The file system does not support locks.
        return False
    return False
