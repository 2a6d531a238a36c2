"""File systems for fsspec that have no rename, and that fail or are killed at a chosen operation."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class NoRename(LocalFileSystem):
    """Local files that cannot be renamed, moved or copied."""

    protocol = "norename"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("norename://"))

    def mv_file(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("this file system has no rename")

    mv = move = rename = cp_file = copy = mv_file


class Dead(BaseException):
    """The process was killed; none of its code runs any more."""


class Faulty(MemoryFileSystem):
    """Files in memory; the ``fail_at``-th operation fails, or kills the process in the middle of a write."""

    protocol = "faulty"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 -- fsspec shares it through the class
    pseudo_dirs = [""]  # noqa: RUF012
    operations = 0
    fail_at = -1
    kills = False
    dead = False

    @classmethod
    def reset(cls, *, fail_at: int = -1, kills: bool = False) -> None:
        """Reset the faults and keep the files."""
        cls.operations, cls.fail_at, cls.kills, cls.dead = 0, fail_at, kills, False

    @classmethod
    def clear(cls) -> None:
        """Remove all files and reset the faults."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reset()

    @classmethod
    def tick(cls) -> None:
        """Count an operation, and fail at the chosen one."""
        if cls.dead:
            raise Dead
        cls.operations += 1
        if cls.operations == cls.fail_at:
            cls.dead = cls.kills
            raise Dead if cls.kills else OSError(5, "storage failure")

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.tick()
        file = super().open(path, mode, **kwargs)
        if "w" in mode:
            plain = file.write

            def write(data: bytes) -> int:
                plain(data[: len(data) // 2])
                self.tick()
                plain(data[len(data) // 2 :])
                return len(data)

            file.write = write
        return file

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        try:
            self.tick()
        except BaseException:
            # Simulate a file system whose writes are not atomic.
            super().pipe_file(path, value[: len(value) // 2], **kwargs)
            raise
        super().pipe_file(path, value, **kwargs)
        self.tick()

    def ls(self, path: str, **kwargs: Any) -> Any:
        self.tick()
        return super().ls(path, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self.tick()
        return super().info(path, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> Any:
        self.tick()
        return super().cat_file(path, **kwargs)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.tick()
        super().makedirs(path, exist_ok=exist_ok)

    def rm_file(self, path: str) -> None:
        self.tick()
        super().rm_file(path)

    def rmdir(self, path: str) -> None:
        self.tick()
        super().rmdir(path)

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("this file system has no rename")

    move = rename = cp_file = copy = mv


def register() -> None:
    """Register both file systems with fsspec."""
    for system in (NoRename, Faulty):
        fsspec.register_implementation(system.protocol, system, clobber=True)
