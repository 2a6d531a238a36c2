"""The interface of all formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any

__all__ = ["BaseFileHandler"]


class BaseFileHandler(ABC):
    """Base class of formats.

    ``str_like`` is whether the format is text; otherwise, it consists of bytes.
    """

    str_like = True

    @abstractmethod
    def load_from_fileobj(self, file: IO[Any], **kwargs: Any) -> Any:
        """Read an object from an open file."""

    @abstractmethod
    def dump_to_fileobj(self, obj: Any, file: IO[Any], **kwargs: Any) -> None:
        """Write an object to an open file."""

    @abstractmethod
    def dump_to_str(self, obj: Any, **kwargs: Any) -> Any:
        """Return an object as text or bytes."""

    def load_from_path(self, filepath: str | Path, mode: str = "r", **kwargs: Any) -> Any:
        """Read an object from a file."""
        with Path(filepath).open(mode) as file:
            return self.load_from_fileobj(file, **kwargs)

    def dump_to_path(self, obj: Any, filepath: str | Path, mode: str = "w", **kwargs: Any) -> None:
        """Write an object to a file."""
        with Path(filepath).open(mode) as file:
            self.dump_to_fileobj(obj, file, **kwargs)
