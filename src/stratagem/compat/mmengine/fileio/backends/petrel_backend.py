"""Files in object stores such as S3, through the library fsspec instead of MMEngine's client, which is not public."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.compat.mmengine.fileio.backends.http_backend import temporary_copy
from stratagem.compat.mmengine.fileio.backends.local_backend import check_suffix
from stratagem.utils import import_module

__all__ = ["PetrelBackend"]


class PetrelBackend(BaseStorageBackend):
    """Read and write files in object stores with fsspec, which needs a library for the store, such as ``s3fs``.

    A prefix ``cluster:`` before the address is removed, and ``petrel://`` means ``s3://``.

    Args:
        path_mapping: parts of local paths, and the addresses that replace the first of them that a path has.
        enable_mc: MMEngine's client caches files on memcached servers if this is true; fsspec has no such cache, so that both
            values do the same.
        conf_path: the configuration file of MMEngine's client; must be None, because fsspec is configured by the environment.
        options: arguments of the fsspec file system, such as ``endpoint_url``.

    Raises:
        AssertionError: if ``path_mapping`` is not a dict, or ``conf_path`` is given.
    """

    def __init__(
        self,
        path_mapping: Mapping[str, str] | None = None,
        enable_mc: bool = True,
        conf_path: str | None = None,
        **options: Any,
    ) -> None:
        require(
            path_mapping is None or isinstance(path_mapping, dict),
            f"path_mapping must be a dict, got {path_mapping!r}.",
        )
        require(conf_path is None, "conf_path is not supported. Configure the object store by environment variables.")
        self.path_mapping = path_mapping or {}
        self._options = options

    def get(self, filepath: str | Path) -> bytes:
        store, path = self._locate(filepath)
        content: bytes = store.cat_file(path)
        return content

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        return self.get(filepath).decode(encoding)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file."""
        store, path = self._locate(filepath)
        store.pipe_file(path, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write a text file."""
        self.put(obj.encode(encoding), filepath)

    def exists(self, filepath: str | Path) -> bool:
        """Return whether there is a file or folder."""
        store, path = self._locate(filepath)
        return bool(store.exists(path))

    def isdir(self, filepath: str | Path) -> bool:
        """Return whether there is a folder."""
        store, path = self._locate(filepath)
        return bool(store.isdir(path))

    def isfile(self, filepath: str | Path) -> bool:
        """Return whether there is a file."""
        store, path = self._locate(filepath)
        return bool(store.isfile(path))

    def join_path(self, filepath: str | Path, *filepaths: str | Path) -> str:
        """Return the joined address."""
        return "/".join([self._address(filepath).rstrip("/"), *(str(part).strip("/") for part in filepaths)])

    @contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str]:
        """Yield the path of a temporary copy, which is removed at the end of the block."""
        with temporary_copy(self.get(filepath)) as path:
            yield path

    def copyfile(self, src: str | Path, dst: str | Path) -> str:
        """Copy a file in the store to a file or into a folder; return the address of the copy."""
        target = self.join_path(dst, Path(str(src)).name) if self.isdir(dst) else self._address(dst)
        self.put(self.get(src), target)
        return target

    def copyfile_from_local(self, src: str | Path, dst: str | Path) -> str:
        """Upload a file to a file or into a folder; return its address."""
        target = self.join_path(dst, Path(src).name) if self.isdir(dst) else self._address(dst)
        self.put(Path(src).read_bytes(), target)
        return target

    def copyfile_to_local(self, src: str | Path, dst: str | Path) -> str | Path:
        """Download a file to a file or into a folder; return its path."""
        target = Path(dst) / Path(str(src)).name if Path(dst).is_dir() else Path(dst)
        target.write_bytes(self.get(src))
        return type(dst)(target)

    def copytree(self, src: str | Path, dst: str | Path) -> str:
        """Copy a folder in the store; return the address of the copy."""
        for path in self.list_dir_or_file(src, list_dir=False, recursive=True):
            self.put(self.get(self.join_path(src, path)), self.join_path(dst, path))
        return self._address(dst)

    def copytree_from_local(self, src: str | Path, dst: str | Path) -> str:
        """Upload a folder; return its address."""
        for path in (path for path in Path(src).rglob("*") if path.is_file()):
            self.put(path.read_bytes(), self.join_path(dst, path.relative_to(src).as_posix()))
        return self._address(dst)

    def copytree_to_local(self, src: str | Path, dst: str | Path) -> str | Path:
        """Download a folder; return its path."""
        for path in self.list_dir_or_file(src, list_dir=False, recursive=True):
            target = Path(dst) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.get(self.join_path(src, path)))
        return dst

    def remove(self, filepath: str | Path) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: if it does not exist.
            IsADirectoryError: if it is a folder.
        """
        store, path = self._locate(filepath)
        if store.isdir(path):
            raise IsADirectoryError(f"{filepath} is a folder. Remove it with rmtree().")
        if not store.exists(path):
            raise FileNotFoundError(f"{filepath} does not exist.")
        store.rm_file(path)

    def rmtree(self, dir_path: str | Path) -> None:
        """Remove a folder and its content."""
        store, path = self._locate(dir_path)
        store.rm(path, recursive=True)

    def copy_if_symlink_fails(self, src: str | Path, dst: str | Path) -> bool:
        """Copy a file or folder, since object stores have no links; return False."""
        (self.copyfile if self.isfile(src) else self.copytree)(src, dst)
        return False

    def list_dir_or_file(
        self,
        dir_path: str | Path,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """Return an iterator over the paths in a folder, relative to it; see ``LocalBackend.list_dir_or_file``."""
        check_suffix(suffix, list_dir=list_dir)
        store, root = self._locate(dir_path)

        def scan(folder: str) -> Iterator[str]:
            for entry in store.ls(folder, detail=True):
                path = entry["name"].removeprefix(root.rstrip("/") + "/")
                if entry["type"] == "directory":
                    if list_dir:
                        yield path
                    if recursive:
                        yield from scan(entry["name"])
                elif list_file and (suffix is None or path.endswith(suffix)):
                    yield path

        return scan(root)

    def generate_presigned_url(self, url: str, client_method: str = "get_object", expires_in: int = 3600) -> str:
        """Return an address with which anybody can access a file for some time.

        Args:
            url: the file.
            client_method: what it allows; ``"get_object"`` to read the file.
            expires_in: for how many seconds.
        """
        store, path = self._locate(url)
        return str(store.sign(path, expiration=expires_in, client_method=client_method))

    def _address(self, filepath: str | Path) -> str:
        address = str(filepath).replace("\\", "/")
        if "://" not in address:
            found = next((part for part in self.path_mapping if part in address), "")
            address = address.replace(found, self.path_mapping[found], 1) if found else address
        scheme, separator, rest = address.partition("://")
        scheme = scheme.rpartition(":")[2] if separator else scheme
        return f"{'s3' if scheme == 'petrel' else scheme}{separator}{rest}"

    def _locate(self, filepath: str | Path) -> tuple[Any, str]:
        fsspec = import_module("fsspec", extra="remote")
        store, path = fsspec.core.url_to_fs(self._address(filepath), **self._options)
        return store, path
