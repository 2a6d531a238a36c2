"""Read lists and mappings from text files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.checks import InvalidArgumentError
from stratagem.compat.mmengine.fileio.io import open_backend

__all__ = ["dict_from_file", "list_from_file"]


def list_from_file(
    filename: str | Path,
    prefix: str = "",
    offset: int = 0,
    max_num: int = 0,
    encoding: str = "utf-8",
    file_client_args: Mapping[str, Any] | None = None,
    backend_args: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the lines of a text file.

    Args:
        filename: the address of the file.
        prefix: is added to the start of each line.
        offset: how many lines at the start are skipped.
        max_num: how many lines are returned at most; all if it is not positive.
        encoding: the encoding of the file.
        file_client_args: the arguments of a ``FileClient``; deprecated.
        backend_args: the name and the arguments of the back end.

    Raises:
        ValueError: if both kinds of arguments are given.
    """
    lines = _lines(filename, encoding, file_client_args, backend_args)
    return [prefix + line for line in islice(lines, offset, offset + max_num if max_num > 0 else None)]


def dict_from_file(
    filename: str | Path,
    key_type: Callable[[str], Any] = str,
    encoding: str = "utf-8",
    file_client_args: Mapping[str, Any] | None = None,
    backend_args: Mapping[str, Any] | None = None,
) -> dict[Any, Any]:
    """Return a mapping from a text file: the first word of each line is a key, the second its value, or the others in a list.

    Args:
        filename: the address of the file.
        key_type: converts the keys.
        encoding: the encoding of the file.
        file_client_args: the arguments of a ``FileClient``; deprecated.
        backend_args: the name and the arguments of the back end.

    Raises:
        AssertionError: if a line has fewer than two words.
        ValueError: if both kinds of arguments are given.
    """
    mapping: dict[Any, Any] = {}
    for number, line in enumerate(_lines(filename, encoding, file_client_args, backend_args), start=1):
        key, *values = line.split() or [""]
        if not values:
            raise InvalidArgumentError(f"{filename}:{number}: expected a key and a value, got {line!r}.")
        mapping[key_type(key)] = values if len(values) > 1 else values[0]
    return mapping


def _lines(
    filename: str | Path,
    encoding: str,
    file_client_args: Mapping[str, Any] | None,
    backend_args: Mapping[str, Any] | None,
) -> list[str]:
    text = open_backend(filename, file_client_args, backend_args).get_text(filename, encoding)
    lines: list[str] = text.removesuffix("\n").split("\n") if text else []
    return [line.rstrip("\r") for line in lines]
