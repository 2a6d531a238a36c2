"""Functions on paths and folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = [
    "check_file_exist",
    "find_vcs_root",
    "fopen",
    "is_abs",
    "is_filepath",
    "mkdir_or_exist",
    "scandir",
    "symlink",
]

_URLS = ("http://", "https://", "s3://")


def is_filepath(x: object) -> bool:
    """Return whether ``x`` is a string or a :class:`pathlib.Path`."""
    return isinstance(x, str | Path)


def fopen(filepath: str | Path, *args: Any, **kwargs: Any) -> IO[Any]:
    """Open a file, with the arguments of :func:`open`.

    Raises:
        ValueError: if ``filepath`` is neither a string nor a path.
    """
    if not is_filepath(filepath):
        raise ConfigValueError(f"filepath must be a string or a Path, got {filepath!r}.")
    file: IO[Any] = open(filepath, *args, **kwargs)  # noqa: SIM115, PTH123 -- the caller closes it
    return file


def check_file_exist(filename: str | Path, msg_tmpl: str = 'file "{}" does not exist') -> None:
    """Raise an error if a file does not exist.

    Raises:
        FileNotFoundError: with the message ``msg_tmpl``.
    """
    if not Path(filename).is_file():
        raise FileNotFoundError(msg_tmpl.format(filename))


def mkdir_or_exist(dir_name: str | Path, mode: int = 0o777) -> None:
    """Create a folder and its parents unless they exist; ``~`` is the home folder, and an empty name does nothing."""
    if dir_name != "":
        Path(dir_name).expanduser().mkdir(mode=mode, parents=True, exist_ok=True)


def symlink(src: str | Path, dst: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
    """Create the symbolic link ``dst``, which points to ``src``. With ``overwrite``, replace an existing file or link."""
    link = Path(dst)
    if overwrite and os.path.lexists(link):
        link.unlink()
    os.symlink(src, link, **kwargs)  # noqa: PTH211 -- Path.symlink_to has another argument


def scandir(
    dir_path: str | Path,
    suffix: str | tuple[str, ...] | None = None,
    recursive: bool = False,
    case_sensitive: bool = True,
) -> Iterator[str]:
    """Return an iterator over the paths of files in a folder, relative to it; names that start with a dot are skipped.

    Args:
        dir_path: the folder.
        suffix: only files whose names end with it, or with one of them.
        recursive: whether to search in the folders of the folder, too.
        case_sensitive: whether the case of the suffix matters.

    Raises:
        TypeError: if the folder is not a path, or the suffix not a string or a tuple of strings.
    """
    if not is_filepath(dir_path):
        raise ConfigTypeError(f"dir_path must be a string or a Path, got {dir_path!r}.")
    if not (suffix is None or isinstance(suffix, str | tuple)):
        raise ConfigTypeError(f"suffix must be a string or a tuple of strings, got {suffix!r}.")
    if suffix is not None and not case_sensitive:
        suffix = suffix.lower() if isinstance(suffix, str) else tuple(item.lower() for item in suffix)
    root = os.fspath(dir_path)

    def scan(folder: str) -> Iterator[str]:
        for entry in os.scandir(folder):
            if not entry.name.startswith(".") and entry.is_file():
                path = os.path.relpath(entry.path, root)
                if suffix is None or (path if case_sensitive else path.lower()).endswith(suffix):
                    yield path
            elif recursive and entry.is_dir():
                yield from scan(entry.path)

    return scan(root)


def find_vcs_root(path: str | Path, markers: Sequence[str] = (".git",)) -> str | None:
    """Return the closest folder of ``path``, or itself, that contains a marker of a version control system, or None."""
    start = Path(path).expanduser().absolute()
    for folder in (start.parent, *start.parent.parents) if start.is_file() else (start, *start.parents):
        if any((folder / marker).exists() for marker in markers):
            return os.fspath(folder)
    return None


def is_abs(path: str) -> bool:
    """Return whether a path is absolute, or the address of a file on a server or in an object store."""
    return os.path.isabs(path) or path.startswith(_URLS)  # noqa: PTH117
