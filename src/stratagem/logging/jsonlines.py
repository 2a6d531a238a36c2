"""Write records as JSON Lines, one object per line. Every line is valid JSON, regardless of the values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, final

from stratagem.errors import WorkDirError
from stratagem.utils import absolute, mask_text
from stratagem.utils.regular_files import open_regular

__all__ = ["JsonLinesWriter"]

_MAX_DEPTH = 20  # Deeper nesting in a record is assumed to be a mistake.
_MAX_INTEGER_BITS = 1024  # Python refuses to convert integers with thousands of digits to text.
_ENCODE = json.JSONEncoder(allow_nan=False).encode


@final
class JsonLinesWriter:
    """Append records to a file as ASCII lines, flushed after each record.

    NaN and infinities are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float()`` parses.
    Tensors and arrays are written as numbers and lists, and unsupported values as strings. An incomplete last line, left by
    a killed process, is terminated first.

    Raises:
        WorkDirError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = absolute(path)
        self._is_released = False
        try:
            self._file: TextIO = self._open()
        except OSError as error:
            raise WorkDirError(
                f"{self.path}: cannot be opened for writing ({error.strerror}). "
                "Create its directory, or choose another file."
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Values of any type are accepted.

        Raises:
            OSError: if writing fails, for example because the disk is full.
            ValueError: if the writer is closed.
        """
        if self._is_released:
            self._file, self._is_released = self._open(), False
        self._file.write(mask_text(_ENCODE(_plain(record))) + "\n")
        self._file.flush()

    def release_file(self) -> None:
        """Close the file until the next record, which opens it again. Idempotent; has no effect after :meth:`close`."""
        if not self._file.closed:
            self.close()
            self._is_released = True

    def close(self) -> None:
        """Close the file. Idempotent. After a failed write, the file may be incomplete."""
        self._is_released = False
        # close() tries again to write what a failed write left in the buffer.
        with suppress(OSError):
            self._file.close()

    def _open(self) -> TextIO:
        file = open(self.path, "a", encoding="ascii", opener=open_regular)  # noqa: SIM115
        if file.tell() > 0 and not _ends_with_newline(self.path):
            file.write("\n")
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Convert the value to JSON types; ``within`` contains the ids of the enclosing values."""
    if type(value) is float and math.isfinite(value):
        return value  # the common case
    if id(value) in within or len(within) >= _MAX_DEPTH:
        return _text(value)
    try:
        return _convert(value, (*within, id(value)))
    except Exception:  # noqa: BLE001 -- a meta tensor or a broken mapping must not abort a run
        return _text(value)


def _convert(value: Any, within: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_INTEGER_BITS else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name_of(value)
    if isinstance(value, Mapping):
        return {_text(key): _plain(inner, within) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner, within) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), within)
    return _text(value)


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 -- a value that cannot be printed must not abort a run
        return f"<{type(value).__name__} that cannot be printed>"
