"""The marker with which a pure-Python configuration says what it is based on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["read_base"]


@contextmanager
def read_base() -> Iterator[None]:
    """Mark the imports in the block as bases of this configuration.

    ``Config.fromfile`` reads ``from .base import *`` below it from the file ``base.py``. In a module that is imported
    normally it marks nothing and they are plain imports, so that editors and type checkers understand the file.
    """
    yield
