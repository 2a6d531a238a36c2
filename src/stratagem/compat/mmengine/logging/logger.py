"""The logger of a run."""

from __future__ import annotations

import logging
import logging.handlers
import os
import socket
import sys
from collections.abc import Mapping
from getpass import getuser
from pathlib import Path
from typing import Any

import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.utils.manager import ManagerMixin
from stratagem.distributed import get_rank, get_world_size
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.logging.logger import parse_level
from stratagem.utils import did_you_mean, mask_text

__all__ = ["FilterDuplicateWarning", "MMFormatter", "MMLogger", "print_log"]

# The codes of the terminal for the color of each level's name.
_COLORS = {"DEBUG": 32, "INFO": 37, "WARNING": 33, "ERROR": 31, "CRITICAL": 31}
_REMEMBERED_WARNINGS = 1000


class FilterDuplicateWarning(logging.Filter):
    """Drop repeated warnings; the record of past warnings is cleared after 1000 distinct ones."""

    def __init__(self, name: str = "mmengine") -> None:
        super().__init__(name)
        self.seen: set[Any] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        if record.msg in self.seen:
            return False
        if len(self.seen) >= _REMEMBERED_WARNINGS:
            self.seen.clear()
        self.seen.add(record.msg)
        return True


class MMFormatter(logging.Formatter):
    """Format as ``<time> - <name> - <LEVEL> - <message>``; errors have path, function and line before the message.

    Secrets in the message are masked.

    Args:
        color: whether the level's name is underlined and colored.
        blink: whether the names INFO and DEBUG blink. The names of higher levels blink if they are colored.
    """

    def __init__(self, color: bool = True, blink: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(color or not blink, "blink=True needs color=True.")
        self._color, self._blink = color, blink

    def format(self, record: logging.LogRecord) -> str:
        level = self._get_prefix(record.levelname, record.levelno)
        place = ""
        if record.levelno >= logging.ERROR:
            place = f"{record.pathname} - {record.funcName} - {record.lineno} - "
        self._style._fmt = "%(asctime)s - %(name)s - " + (level + " - " + place).replace("%", "%%") + "%(message)s"
        return mask_text(super().format(record))

    def usesTime(self) -> bool:  # noqa: N802 -- the name in the logging module
        return True

    def _get_prefix(self, level: str, number: int) -> str:
        if not self._color or level not in _COLORS:
            return level
        attributes = [4, *([5] if self._blink or number >= logging.WARNING else []), _COLORS[level]]
        return f"\033[{';'.join(map(str, attributes))}m{level}\033[0m"


class MMLogger(logging.Logger, ManagerMixin):
    """A logger that writes to the console and to a file. It is not registered in the ``logging`` module.

    On ranks other than 0, only errors are written to the console, and no file, unless ``distributed`` is true or the level is
    DEBUG: then each rank writes ``<stem>_<user>@<host>_device<number>_rank<rank><suffix>``. Repeated warnings are dropped.

    Args:
        name: the name of the instance.
        logger_name: the name in the lines.
        log_file: the file; none by default.
        log_level: the lowest level that is written.
        file_mode: the mode to open the file with.
        distributed: whether every rank writes a file.
        file_handler_cfg: ``type``, the name of a file handler of the ``logging`` module, and its arguments.

    Raises:
        ValueError: if a level or the type of the file handler is unknown.
    """

    def __init__(
        self,
        name: str,
        logger_name: str = "mmengine",
        log_file: str | os.PathLike[str] | None = None,
        log_level: int | str = "INFO",
        file_mode: str = "w",
        distributed: bool = False,
        file_handler_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        logging.Logger.__init__(self, logger_name)
        ManagerMixin.__init__(self, name)
        level, rank = parse_level(log_level), _get_rank()
        console = logging.StreamHandler(stream=sys.stdout)
        console.setFormatter(MMFormatter(color=_shows_colors(), datefmt="%m/%d %H:%M:%S"))
        console.setLevel(level if rank == 0 else max(level, logging.ERROR))
        console.addFilter(FilterDuplicateWarning(logger_name))
        self.handlers.append(console)
        self._is_released = False
        self._log_file: str | None = None
        if log_file is not None:
            every_rank = (distributed or level <= logging.DEBUG) and _get_world_size() > 1
            self._log_file = os.fspath(_file_of_rank(Path(log_file), rank) if every_rank else log_file)
            if rank == 0 or every_rank:
                handler = _build_file_handler(self._log_file, file_mode, file_handler_cfg)
                handler.setFormatter(MMFormatter(color=False, datefmt="%Y/%m/%d %H:%M:%S"))
                handler.setLevel(level)
                handler.addFilter(FilterDuplicateWarning(logger_name))
                self.handlers.append(handler)

    @property
    def log_file(self) -> str | None:
        """The file of this rank, or None."""
        return self._log_file

    @classmethod
    def get_current_instance(cls) -> MMLogger:
        """Return the logger that was created last; create one called ``"mmengine"`` if there is none."""
        if not cls._instance_dict:
            cls.get_instance("mmengine")
        current: MMLogger = super().get_current_instance()
        return current

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802 -- the name in the logging module
        """Pass a record to the handlers of this logger only; without handlers, the record is dropped."""
        for handler in self.handlers:
            if record.levelno >= handler.level:
                handler.handle(record)
        if self._is_released:
            self.release_files()

    @property
    def file_handlers(self) -> list[logging.FileHandler]:
        """The handlers that write to files."""
        return [handler for handler in self.handlers if isinstance(handler, logging.FileHandler)]

    def release_files(self) -> None:
        """Close the files; later lines are appended, and keep the files open only while they are written. Idempotent."""
        self._is_released = True
        for handler in self.file_handlers:
            handler.mode = "a"
            handler.close()

    def write_to_files(self, text: str) -> bool:
        """Append text without a prefix to the log files; return whether there is a log file."""
        for handler in self.file_handlers:
            if handler.stream is None:
                handler.stream = handler._open()
            handler.stream.write(text)
            handler.stream.flush()
        if self._is_released:
            self.release_files()
        return bool(self.file_handlers)

    def setLevel(self, level: int | str) -> None:  # noqa: N802 -- the name in the logging module
        """Set the lowest level of the records that the handlers receive."""
        self.level = parse_level(level)
        # The logging module clears this cache only for loggers that it knows.
        self._cache: dict[int, bool] = {}


def print_log(msg: object, logger: logging.Logger | str | None = None, level: int = logging.INFO) -> None:
    """Log a message.

    Args:
        msg: the message.
        logger: a logger, the name of an ``MMLogger``, ``"current"`` for the one created last, ``"silent"`` to do nothing, or
            None to print the message.
        level: the level of the message.

    Raises:
        ValueError: if no logger has the name.
        TypeError: if ``logger`` is something else.
    """
    if logger is None:
        print(msg)  # noqa: T201 -- the interface of MMEngine
    elif isinstance(logger, logging.Logger):
        logger.log(level, msg)
    elif not isinstance(logger, str):
        raise ConfigTypeError(
            f"logger must be a logger, the name of one, 'current', 'silent' or None, got {logger!r} ({type(logger).__name__})."
        )
    elif logger == "current":
        MMLogger.get_current_instance().log(level, msg)
    elif logger != "silent":
        if not MMLogger.check_instance_created(logger):
            raise ConfigValueError(
                f"MMLogger {logger!r} has not been created. {did_you_mean(logger, MMLogger._instance_dict)}"
            )
        MMLogger.get_instance(logger).log(level, msg)


def _get_world_size() -> int:
    return get_world_size()


def _get_rank() -> int:
    return get_rank()


def _get_device_id() -> int | str:
    """Return the number, or the identifier, of this process's device on its host."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available() or not visible:
        return local_rank
    device = visible.split(",")[local_rank].strip()
    return int(device) if device.isdigit() else device


def _get_host_info() -> str:
    """Return ``<user>@<host>``; empty if the user has no name, as in some containers."""
    try:
        return f"{getuser()}@{socket.gethostname()}"
    except (OSError, KeyError, ImportError):
        return ""


def _file_of_rank(file: Path, rank: int) -> Path:
    parts = (file.stem, _get_host_info(), f"device{_get_device_id()}", f"rank{rank}")
    return file.with_name("_".join(part for part in parts if part) + file.suffix)


def _shows_colors() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _build_file_handler(file: str, mode: str, cfg: Mapping[str, Any] | None) -> logging.FileHandler:
    if cfg is None:
        return logging.FileHandler(file, mode, encoding="utf-8")
    require("type" in cfg, f"file_handler_cfg has no key 'type', such as 'RotatingFileHandler': {dict(cfg)!r}.")
    known = {
        name: item
        for name, item in vars(logging.handlers).items()
        if isinstance(item, type) and issubclass(item, logging.FileHandler)
    }
    if cfg["type"] not in known:
        raise ConfigValueError(
            f"`logging.handlers` has no file handler {cfg['type']!r}. {did_you_mean(str(cfg['type']), known)}"
        )
    arguments = {"filename": file, **{key: value for key, value in cfg.items() if key != "type"}}
    return known[cfg["type"]](**arguments)
