"""File systems by URL, through fsspec, with the few operations that publication needs."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, Self, final

from stratagem.errors import CheckpointError, MissingDependencyError
from stratagem.utils import import_module, mask_text
from stratagem.utils.imports import without_working_directory

__all__ = ["RemoteFolder", "is_remote_scheme"]


def is_remote_scheme(scheme: str) -> bool:
    """Tell whether fsspec, where it is installed, knows file systems of that scheme, such as ``s3`` or ``memory``."""
    try:
        registry: Any = import_module("fsspec", extra="remote")
        with without_working_directory():
            registry.get_filesystem_class(scheme)
    except (MissingDependencyError, ValueError):
        return False
    except ImportError:
        return True  # known, and the package for it is what is missing
    return True


@final
@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder of a file system; ``url`` may hold secrets."""

    _system: Any
    _path: str
    url: str = field(repr=False)

    @property
    def shown(self) -> str:
        """Its URL as it may be printed."""
        return mask_text(self.url)

    @classmethod
    def parent_of(cls, url: str) -> tuple[Self, str]:
        """Return the folder that a URL's last part lies in, and that part.

        Raises:
            MissingDependencyError: if fsspec, or what it needs for this scheme, is not installed.
            CheckpointError: if the URL names no place in a folder.
        """
        folder, _, name = url.rstrip("/").rpartition("/")
        if "://" not in folder or "::" in url:
            raise CheckpointError(f"{mask_text(url)} is no place for files. Write <scheme>://<folder>/<name>.")
        return cls.at(folder), name

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the folder that a URL names; it need not exist.

        Raises:
            MissingDependencyError: if fsspec, or what it needs for this scheme, is not installed.
            CheckpointError: if the URL cannot be understood.
        """
        core: Any = import_module("fsspec.core", extra="remote")
        try:
            with without_working_directory():
                system, path = core.url_to_fs(url)
        except ImportError as error:
            raise MissingDependencyError(f"{mask_text(url)}: {error}") from error
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{mask_text(url)} is not a place that fsspec can open: {error}.") from error
        return cls(system, path, url)

    def folder(self, name: str) -> Self:
        """Return a folder in it."""
        return type(self)(self._system, self._join(name), f"{self.url}/{name}")

    def names(self) -> list[str]:
        """Return the names of what is in it; none where there is no such folder."""
        self._system.invalidate_cache()
        try:
            entries = self._system.ls(self._path, detail=True)
        except FileNotFoundError:
            return []
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]

    def paths(self) -> list[str]:
        """Return the paths of all files in it and below, from here."""
        self._system.invalidate_cache()
        root = self._system._strip_protocol(self._path).rstrip("/") + "/"
        return [path.removeprefix(root) for path in self._system.find(self._path)]

    def make(self, path: str = "") -> None:
        """Make it, or a folder below it, where the file system has folders at all."""
        self._system.makedirs(self._join(path), exist_ok=True)

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """Give a new file to write to."""
        with self._system.open(self._join(path), "wb") as file:
            yield file

    @contextmanager
    def reading(self, path: str) -> Iterator[IO[bytes]]:
        """Give a file to read from."""
        with self._system.open(self._join(path), "rb") as file:
            yield file

    def write(self, path: str, data: bytes) -> None:
        """Write a small file: one request, where the file system is a service."""
        self._system.pipe_file(self._join(path), data)

    def read(self, path: str, most: int) -> bytes | None:
        """Return what a small file holds, or None if there is none or it is larger than ``most`` bytes."""
        self._system.invalidate_cache()
        try:
            if self.size(path) > most:
                return None
            return bytes(self._system.cat_file(self._join(path)))
        except FileNotFoundError:
            return None

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        self._system.invalidate_cache()
        return int(self._system.info(self._join(path))["size"])

    def version(self, path: str) -> str:
        """Return what changes when a file's content does, as far as its file system knows."""
        self._system.invalidate_cache()
        return str(self._system.ukey(self._join(path)))

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with suppress(FileNotFoundError):
            self._system.rm_file(self._join(path))

    def remove_empty_folders(self) -> None:
        """Remove it, and the folders in it, where nothing is in them; object stores have none."""
        with suppress(OSError, NotImplementedError):
            for folder, _, _ in sorted(self._system.walk(self._path), reverse=True):
                self._system.rmdir(folder)
        self._system.invalidate_cache()

    def _join(self, path: str) -> str:
        return posixpath.join(self._path, path) if path else self._path
