"""The interface of all back ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

__all__ = ["BaseStorageBackend"]


class BaseStorageBackend(ABC):
    """Base class of back ends. Each reads files with ``get`` and ``get_text``, and can support more methods."""

    _allow_symlink = False

    @property
    def allow_symlink(self) -> bool:
        """Whether the back end supports symbolic links."""
        return self._allow_symlink

    @property
    def name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @abstractmethod
    def get(self, filepath: str | Path) -> Any:
        """Return the content of a file as bytes."""

    @abstractmethod
    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        """Return the content of a text file."""
