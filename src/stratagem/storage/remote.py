"""Access remote file systems by URL through fsspec, with the operations needed for publication."""

from __future__ import annotations

import posixpath
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, Final, Self, final

from stratagem.errors import CheckpointError, MissingDependencyError
from stratagem.storage.hosts import is_link_local, is_loopback
from stratagem.utils import import_module, mask_text
from stratagem.utils.imports import without_working_directory

__all__ = ["RemoteFolder", "is_remote_scheme"]

# fsspec protocols whose connections a third party can read and modify.
_WITHOUT_ENCRYPTION: Final = {"dask", "ftp", "http", "jlab", "jupyter", "tftp", "webhdfs"}


def is_remote_scheme(scheme: str) -> bool:
    """Return whether fsspec is installed and supports the scheme, such as ``s3`` or ``memory``."""
    try:
        registry: Any = import_module("fsspec", extra="remote")
        with without_working_directory():
            registry.get_filesystem_class(scheme)
    except (MissingDependencyError, ValueError):
        return False
    except ImportError:
        return True  # The scheme is known, but its package is not installed.
    return True


def _require_safe(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if is_link_local(parts.hostname):
        raise CheckpointError(
            f"{mask_text(url)}: checkpoints cannot be stored at a link-local address or a metadata service. "
            "Use a different host."
        )
    if parts.scheme.lower() in _WITHOUT_ENCRYPTION and not is_loopback(parts.hostname):
        raise CheckpointError(
            f"{mask_text(url)}: {parts.scheme}:// is not encrypted, so a third party could replace or read the files. Use "
            "sftp://, https:// or an object store such as s3://."
        )


@final
@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder of a file system; ``url`` may contain secrets."""

    _system: Any
    _path: str
    url: str = field(repr=False)

    @property
    def masked_url(self) -> str:
        """The URL with its secrets masked."""
        return mask_text(self.url)

    @classmethod
    def parent_of(cls, url: str) -> tuple[Self, str]:
        """Split a URL into its parent folder and its last component.

        Raises:
            MissingDependencyError: if fsspec or the package for the scheme is not installed.
            CheckpointError: if the URL does not have the form ``<scheme>://<folder>/<name>``.
        """
        folder, _, name = url.rstrip("/").rpartition("/")
        if "://" not in folder or "::" in url:
            raise CheckpointError(f"{mask_text(url)} is not a valid location. Use <scheme>://<folder>/<name>.")
        return cls.at(folder), name

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the folder at a URL, which may not exist yet.

        Raises:
            MissingDependencyError: if fsspec or the package for the scheme is not installed.
            CheckpointError: if fsspec cannot open the URL.
        """
        _require_safe(url)
        core: Any = import_module("fsspec.core", extra="remote")
        try:
            with without_working_directory():
                system, path = core.url_to_fs(url)
        except ImportError as error:
            raise MissingDependencyError(f"{mask_text(url)}: {error}") from error
        except (ValueError, OSError) as error:
            raise CheckpointError(f"fsspec cannot open {mask_text(url)}: {error}.") from error
        return cls(system, path, url)

    def subfolder(self, name: str) -> Self:
        """Return a subfolder."""
        return type(self)(self._system, self._join(name), f"{self.url}/{name}")

    def names(self) -> list[str]:
        """Return the names of the entries; empty if the folder does not exist."""
        self._system.invalidate_cache()
        try:
            entries = self._system.ls(self._path, detail=True)
        except FileNotFoundError:
            return []
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]

    def paths(self) -> list[str]:
        """Return the relative paths of all files in the folder and its subfolders."""
        self._system.invalidate_cache()
        root = self._system._strip_protocol(self._path).rstrip("/") + "/"
        return [path.removeprefix(root) for path in self._system.find(self._path)]

    def create(self, path: str = "") -> None:
        """Create the folder, or a subfolder, if the file system has folders."""
        self._system.makedirs(self._join(path), exist_ok=True)

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """Open a new file for writing."""
        with self._system.open(self._join(path), "wb") as file:
            yield file

    @contextmanager
    def reading(self, path: str) -> Iterator[IO[bytes]]:
        """Open a file for reading."""
        with self._system.open(self._join(path), "rb") as file:
            yield file

    def write(self, path: str, data: bytes) -> None:
        """Write a small file; on an object store, with a single request."""
        self._system.pipe_file(self._join(path), data)

    def read(self, path: str, max_bytes: int) -> bytes | None:
        """Return the contents of a small file, or None if it does not exist or has more than ``max_bytes`` bytes."""
        self._system.invalidate_cache()
        try:
            if self.size(path) > max_bytes:
                return None
            return bytes(self._system.cat_file(self._join(path)))
        except FileNotFoundError:
            return None

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        self._system.invalidate_cache()
        return int(self._system.info(self._join(path))["size"])

    def version(self, path: str) -> str:
        """Return a token that changes when the contents of a file change, as far as the file system detects this."""
        self._system.invalidate_cache()
        return str(self._system.ukey(self._join(path)))

    def remove(self, path: str) -> None:
        """Remove a file; do nothing if it does not exist."""
        with suppress(FileNotFoundError):
            self._system.rm_file(self._join(path))

    def remove_empty_folders(self) -> None:
        """Remove the folder and its subfolders if they are empty; object stores have no folders."""
        with suppress(OSError, NotImplementedError):
            for folder, _, _ in sorted(self._system.walk(self._path), reverse=True):
                self._system.rmdir(folder)
        self._system.invalidate_cache()

    def _join(self, path: str) -> str:
        return posixpath.join(self._path, path) if path else self._path
