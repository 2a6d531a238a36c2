"""Every change that this package makes to a file system, one function for each kind.

All other modules call them as ``operations.write(...)``, so that a test can stand between: it kills the process before,
half-way through or after any of them, lets any fail, or records them to play a power loss.
"""

from __future__ import annotations

import os
from pathlib import Path

from stratagem.storage import exchange as _exchange

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
    """Swap what two names stand for in one step; False, with nothing changed, where the system cannot."""
    return _exchange.exchange(first, second)


def remove_file(path: Path) -> None:
    """Take a file's or link's name away; a missing one is fine."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Take an empty folder away."""
    path.rmdir()
