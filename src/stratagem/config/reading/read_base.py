"""The context manager that marks the bases of a pure-Python configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["read_base"]


@contextmanager
def read_base() -> Iterator[None]:
    """Mark the imports in the block as bases of this configuration.

    For ``from .base import *`` in the block, ``Config.fromfile`` reads the file ``base.py``. When the file is imported as a
    module, the block has no effect and the imports are executed, so that editors and type checkers understand the file.
    """
    yield
