"""A logger for one rank of one run."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, final

from rich.text import Text

from stratagem.errors import ConfigTypeError, ConfigValueError, WorkDirError
from stratagem.logging.console import console_lock, shared_console
from stratagem.utils import absolute, did_you_mean, mask_text
from stratagem.utils.printable import escape_controls
from stratagem.utils.regular_files import open_regular

__all__ = ["Logger", "parse_level"]

_LABEL = "stratagem"
_CONSOLE_TIME = "%m/%d %H:%M:%S"
_FILE_TIME = "%Y/%m/%d %H:%M:%S"
_STYLES = {"DEBUG": "cyan", "INFO": "green", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
_REMEMBERED_WARNINGS = 1000
# The attribute of a record that contains its message, masked and escaped.
_SAFE_MESSAGE = "stratagem_message"


@final
class Logger(logging.Logger):
    """Write log lines to the console and to a file.

    On ranks other than 0, only errors are written to the console. The file is written on rank 0; at level DEBUG or with
    ``distributed=True``, every other rank writes ``<stem>_rank<rank><suffix>`` in the same directory. Every line is flushed.
    Repeated warnings are dropped. Errors include the file, the function and the line.

    The logger is not registered in the ``logging`` module and does not propagate, so two runs in one process never share
    a logger, even with the same name.

    Raises:
        ConfigValueError: if the level is unknown, or the rank is negative.
        WorkDirError: if the file cannot be opened.
    """

    def __init__(
        self,
        name: str,
        *,
        log_level: str | int = "INFO",
        log_file: str | os.PathLike[str] | None = None,
        file_mode: str = "a",
        rank: int = 0,
        distributed: bool = False,
        console: bool = True,
    ) -> None:
        level = parse_level(log_level)
        if file_mode not in ("a", "w"):
            raise ConfigValueError(f"file_mode is {file_mode!r}; it must be 'a' (append) or 'w' (overwrite).")
        if rank < 0:
            raise ConfigValueError(f"rank is {rank}; it must be at least 0.")
        super().__init__(name, level)
        self.log_file: Path | None = None
        if log_file is not None:
            self.log_file = _file_of_rank(absolute(log_file), rank, every_rank=distributed or level <= logging.DEBUG)
        if self.log_file is not None:
            self.addHandler(_open_file(self.log_file, file_mode))
        if console:
            self.addHandler(_ConsoleHandler(level if rank == 0 else max(level, logging.ERROR)))
        if not self.handlers:
            self.addHandler(logging.NullHandler())  # otherwise the logging module writes warnings to stderr
        self.addFilter(_RepeatedWarnings())

    def release_file(self) -> None:
        """Close the file; later lines open it and close it again. Idempotent; has no effect after :meth:`close`."""
        for handler in self.handlers:
            if isinstance(handler, _LogFile):
                handler.release_file()

    def close(self) -> None:
        """Close the file and discard further records. Idempotent."""
        for handler in list(self.handlers):
            self.removeHandler(handler)
            handler.close()
        self.addHandler(logging.NullHandler())


@final
class _Formatter(logging.Formatter):
    """Format as ``<time> - stratagem - <LEVEL> - <message>``, with path, function and line before the message of errors."""

    def __init__(self, time_format: str) -> None:
        super().__init__(f"%(asctime)s - {_LABEL} - %(levelname)s - %(message)s", time_format)
        self._with_location = logging.Formatter(
            f"%(asctime)s - {_LABEL} - %(levelname)s - %(pathname)s - %(funcName)s - %(lineno)d - %(message)s",
            time_format,
        )
        self._second = -1
        self._text = ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with its traceback, if any, with secrets masked and control characters escaped."""
        if record.levelno >= logging.ERROR or record.exc_info or record.stack_info:
            line = self._with_location.format(record) if record.levelno >= logging.ERROR else super().format(record)
            return escape_controls(mask_text(line))
        # The file and the console have the same message, so only the first handler masks it.
        own = record.__dict__
        message = own.get(_SAFE_MESSAGE)
        if message is None:
            own[_SAFE_MESSAGE] = message = escape_controls(mask_text(record.getMessage()))
        return f"{self._time(record)} - {_LABEL} - {record.levelname} - {message}"

    def _time(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._text = second, self.formatTime(record, self.datefmt)
        return self._text


@final
class _LogFile(logging.FileHandler):
    """Write lines to a regular file. If that fails, for example because the disk is full, warn once on the console."""

    _has_failed = False
    _is_released = False

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=open_regular)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- the name in the logging module
        if not self._has_failed:
            self._has_failed = True
            print(f"stratagem: {self.baseFilename} is incomplete: {sys.exc_info()[1]}", file=sys.stderr)  # noqa: T201

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # The file cannot be opened again.
            self.handleError(record)
        if self._is_released:
            self.release_file()

    def release_file(self) -> None:
        """Close the file; later records are appended, and keep the file open only while they are written."""
        self.acquire()
        try:
            self.mode, self._is_released = "a", True
            stream, self.stream = self.stream, None
            if stream is not None:
                stream.close()
        except OSError:  # Buffered lines cannot be written.
            self.handleError(logging.makeLogRecord({}))
        finally:
            self.release()

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # Buffered lines cannot be written.
            self.handleError(logging.makeLogRecord({}))


@final
class _ConsoleHandler(logging.Handler):
    """Write lines above a live progress bar, if there is one, and color the level name on a terminal."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.setFormatter(_Formatter(_CONSOLE_TIME))
        self._plain = not shared_console().is_terminal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console, text = shared_console(), self.format(record)
            if self._plain:
                # No colors and no progress bar, so skip rendering, which takes 0.3 ms.
                console.file.write(text + "\n")
                console.file.flush()
                return
            line = Text(text)
            start = text.index(record.levelname)
            line.stylize(_STYLES.get(record.levelname, ""), start, start + len(record.levelname))
            with console_lock():
                console.print(line, soft_wrap=True)
        except Exception:  # noqa: BLE001 -- like the handlers of the logging module: a log line must not abort a run
            self.handleError(record)


@final
class _RepeatedWarnings(logging.Filter):
    """Drop repeated warnings; the record of past warnings is cleared after 1000 distinct ones."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = str(record.msg), repr(record.args)
        if text in self._seen:
            return False
        if len(self._seen) >= _REMEMBERED_WARNINGS:
            self._seen.clear()
        self._seen.add(text)
        return True


def parse_level(level: str | int) -> int:
    """Return a level as a number.

    Raises:
        ConfigTypeError: if it is neither a name nor a number.
        ConfigValueError: if the name is unknown.
    """
    if isinstance(level, int) and not isinstance(level, bool):
        return level
    if not isinstance(level, str):
        raise ConfigTypeError(f"log_level must be a name or a number, not {level!r} ({type(level).__name__}).")
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise ConfigValueError(f"Unknown log_level {level!r}. {did_you_mean(level, known)}")
    return known[level.upper()]


def _file_of_rank(file: Path, rank: int, *, every_rank: bool) -> Path | None:
    if rank == 0:
        return file
    return file.with_name(f"{file.stem}_rank{rank}{file.suffix}") if every_rank else None


def _open_file(file: Path, mode: str) -> logging.Handler:
    try:
        handler = _LogFile(file, mode, encoding="utf-8")
    except OSError as error:
        raise WorkDirError(
            f"{file}: the log file cannot be opened ({error.strerror}). Create its directory, or choose another file."
        ) from error
    handler.setFormatter(_Formatter(_FILE_TIME))
    return handler
