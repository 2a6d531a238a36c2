"""Files on the local file system. Files are written atomically: an interrupted write leaves the previous content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.errors import ConfigTypeError
from stratagem.storage.atomic import write_atomic

__all__ = ["LocalBackend"]

AnyPath = TypeVar("AnyPath", str, Path)


class LocalBackend(BaseStorageBackend):
    """Read and write files on the local file system."""

    _allow_symlink = True

    def get(self, filepath: str | Path) -> bytes:
        with open(filepath, "rb") as file:  # noqa: PTH123 -- fewer calls: datasets read a file per sample
            return file.read()

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        return Path(filepath).read_text(encoding=encoding)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file; its folder is created if it does not exist."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write a text file; its folder is created if it does not exist."""
        self.put(obj.encode(encoding), filepath)

    def exists(self, filepath: str | Path) -> bool:
        """Return whether there is a file or folder."""
        return Path(filepath).exists()

    def isdir(self, filepath: str | Path) -> bool:
        """Return whether there is a folder."""
        return Path(filepath).is_dir()

    def isfile(self, filepath: str | Path) -> bool:
        """Return whether there is a file."""
        return Path(filepath).is_file()

    def join_path(self, filepath: AnyPath, *filepaths: str | Path) -> AnyPath:
        """Return the joined path, of the type of the first one."""
        return type(filepath)(os.path.join(filepath, *filepaths))  # noqa: PTH118 -- keeps strings unchanged

    @contextmanager
    def get_local_path(self, filepath: AnyPath) -> Iterator[AnyPath]:
        """Yield the path itself."""
        yield filepath

    def copyfile(self, src: str | Path, dst: AnyPath) -> AnyPath:
        """Copy a file to a file or into a folder; return the path of the copy.

        Raises:
            SameFileError: if both are the same file.
        """
        return type(dst)(shutil.copy(src, dst))

    def copytree(self, src: str | Path, dst: AnyPath) -> AnyPath:
        """Copy a folder; return the path of the copy.

        Raises:
            FileExistsError: if the destination exists.
        """
        return type(dst)(shutil.copytree(src, dst))

    copyfile_from_local = copyfile
    copytree_from_local = copytree
    copyfile_to_local = copyfile
    copytree_to_local = copytree

    def remove(self, filepath: str | Path) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: if it does not exist.
            IsADirectoryError: if it is a folder.
        """
        if self.isdir(filepath):
            raise IsADirectoryError(f"{filepath} is a folder. Remove it with rmtree().")
        Path(filepath).unlink()

    def rmtree(self, dir_path: str | Path) -> None:
        """Remove a folder and its content."""
        shutil.rmtree(dir_path)

    def copy_if_symlink_fails(self, src: str | Path, dst: str | Path) -> bool:
        """Create the symbolic link ``dst`` to ``src``, or a copy if that fails; return whether it is a link."""
        try:
            os.symlink(src, dst)  # noqa: PTH211 -- Path.symlink_to has another argument
        except Exception:  # noqa: BLE001 -- whatever the reason, copy
            if self.isfile(src):
                self.copyfile(src, Path(dst))
            else:
                self.copytree(src, Path(dst))
            return False
        return True

    def list_dir_or_file(
        self,
        dir_path: str | Path,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """Return an iterator over paths in a folder, relative to it. Files whose names start with a dot are skipped.

        Args:
            dir_path: the folder.
            list_dir: whether to include folders.
            list_file: whether to include files.
            suffix: only files that end with it, or with one of them; needs ``list_dir=False``.
            recursive: whether to include the content of folders.

        Raises:
            TypeError: if a suffix is given with ``list_dir``, or it is not a string or a tuple of strings.
        """
        check_suffix(suffix, list_dir=list_dir)
        root = os.fspath(dir_path)

        def scan(folder: str) -> Iterator[str]:
            for entry in os.scandir(folder):
                path = os.path.relpath(entry.path, root)
                if entry.is_dir():
                    if list_dir:
                        yield path
                    if recursive:
                        yield from scan(entry.path)
                elif list_file and not entry.name.startswith(".") and (suffix is None or path.endswith(suffix)):
                    yield path

        return scan(root)


def check_suffix(suffix: object, *, list_dir: bool) -> None:
    """Check the suffix of ``list_dir_or_file``.

    Raises:
        TypeError: if it is given with ``list_dir``, or is not a string or a tuple of strings.
    """
    if suffix is None:
        return
    if list_dir:
        raise ConfigTypeError("`suffix` should be None when `list_dir` is True, because folders have no suffix.")
    if not isinstance(suffix, str | tuple):
        raise ConfigTypeError(f"`suffix` must be a string or tuple of strings, got {suffix!r}.")
